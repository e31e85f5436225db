"""Rendering a repository from an engine, held against the contract of TensorRT-LLM 1.2's own models.

Expected tensors and parameters come from tests/data/triton_tensors.json (transcribed from the upstream templates and
the C++ backend's sources), not from our tables or templates.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import golden_repositories
import hand_made
from conftest import DATA, minitron
from minitron import recipe
from minitron.artifacts import manifest
from minitron.errors import EngineError, OutputExists, UsageError
from minitron_triton.repository.check import check
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render

CONTRACT = json.loads((DATA / "triton_tensors.json").read_text())["models"]
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
#: Keys that upstream's models do not read, each with its reason.
OWN_KEYS = {
    "preprocessing": {
        "max_input_len": "the engine's limit, to refuse a long prompt with a clear error",
        "max_seq_len": "the engine's limit, to refuse a long output with a clear error",
        "vocab_size": "length of a row of embedding_bias",
    },
    "postprocessing": {},
    "tensorrt_llm": {"max_queue_size": "requests that wait in the CPU engine; the C++ backend has no parameter for it"},
    "ensemble": {},
    "tensorrt_llm_bls": {
        "tokenizer_dir": "the BLS tokenizes and detokenizes itself: a stopping server cannot be asked any more",
        "add_special_tokens": "as in preprocessing, whose code it shares",
        "skip_special_tokens": "as in postprocessing",
        "max_input_len": "as in preprocessing",
        "max_seq_len": "as in preprocessing",
        "vocab_size": "as in preprocessing",
        "exclude_input_in_output": "the BLS writes the prompt into the answer itself",
        "max_concurrency": "threads of the one instance",
        "max_queue_size": "requests that wait for a thread",
        "max_logits_bytes": "what one request may ask for",
        "cancellation_check_period_ms": "how often it looks for clients that left",
        "context_logits": "whether log probs of the prompt can be had, so that who wants them is told before",
    },
}


def configs(repository: Path) -> dict[str, Any]:
    """The configs, read with Triton's protobuf."""
    return {
        name: text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for name in MODELS
    }


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a hand-made engine."""
    folder = tmp_path_factory.mktemp(request.param)
    engine = hand_made.engine_folder(folder / "engine", cpu=request.param == "cpu")
    render(engine, folder / "repository", RepositoryOptions())
    return folder / "repository"


#: Tensors that a repository has only where a recipe offers logits.
LOGITS = {f"{before}{kind}_logits" for kind in ("context", "generation") for before in ("", "return_")}


def declared(tensor: Any) -> tuple[Any, ...]:
    """What the contract says about a tensor, from a config."""
    reshape = list(tensor.reshape.shape) if tensor.HasField("reshape") else None
    dtype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    flags = (getattr(tensor, "optional", False), getattr(tensor, "allow_ragged_batch", False))
    return dtype, list(tensor.dims), reshape, *flags


def expected(tensor: dict[str, Any]) -> tuple[Any, ...]:
    """The same, from the contract; logits are FP32 in the engines that the tests make by default."""
    dtype = tensor["dtype"].replace("LOGITS_DTYPE", "FP32")
    flags = (tensor["optional"], tensor.get("allow_ragged_batch", False))
    return dtype, tensor["dims"], tensor.get("reshape"), *flags


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_declared_tensors_are_those_of_the_contract(repository: Path, model: str, side: str) -> None:
    """Logits apart: the CPU engine has those of prompts, and the text models offer none unless a recipe asks."""
    on_cpu = configs(repository)["tensorrt_llm"].backend == "python"
    gathered = {"return_context_logits", "context_logits"} if on_cpu and model == "tensorrt_llm" else set()
    wanted = {
        tensor["name"]: expected(tensor)
        for tensor in CONTRACT[model][side + "s"]
        if tensor.get("text_only_needed", True) and "since" not in tensor and tensor["name"] not in LOGITS - gathered
    }
    if (model, side) == ("tensorrt_llm", "input"):
        wanted["no_repeat_ngram_size"] = ("INT32", [1], [], True, False)
    if (model, side) == ("tensorrt_llm_bls", "input"):  # ours beyond upstream's, with tensorrt_llm's meaning
        wanted["stop"] = ("BOOL", [1], None, True, False)
    assert {tensor.name: declared(tensor) for tensor in getattr(configs(repository)[model], side)} == wanted


@pytest.mark.parametrize("model", MODELS)
def test_parameter_keys_are_known_complete_and_not_retired(repository: Path, model: str) -> None:
    known = {parameter["key"]: parameter["required"] for parameter in CONTRACT[model].get("parameters", [])}
    keys = set(configs(repository)[model].parameters)
    must = {key for key, required in known.items() if required in ("required", "key_must_exist")}
    must |= {"gpt_model_path"} if model == "tensorrt_llm" else set()
    assert must <= keys
    assert not {key for key in keys if known.get(key) == "do_not_set"}
    assert keys - set(known) == set(OWN_KEYS[model])


def test_ensemble_maps_are_the_contract_s_without_what_a_text_model_lacks(repository: Path) -> None:
    ours = configs(repository)
    for step, wanted in zip(ours["ensemble"].ensemble_scheduling.step, CONTRACT["ensemble"]["steps"], strict=True):
        model, side_of = ours[wanted["model"]], {"input_map": "input", "output_map": "output"}
        outer = {tensor.name for tensor in (*ours["ensemble"].input, *ours["ensemble"].output)}
        for which, side in side_of.items():
            names = {tensor.name for tensor in getattr(model, side)}
            pairs = {k: v for k, v in wanted[which].items() if k in names and (v.startswith("_") or v in outer)}
            same = wanted[which].get("*same_name*", "")
            if same.startswith("every other"):
                pairs |= {name: name for name in names & outer}
            else:
                pairs |= {name: name for name in same.split() if name in names and name in outer}
            assert dict(getattr(step, which)) == pairs


def test_one_decoupled_one_batch_size_and_an_ordered_postprocessing(repository: Path) -> None:
    ours = configs(repository)
    assert ours["tensorrt_llm"].model_transaction_policy.decoupled
    assert ours["tensorrt_llm_bls"].model_transaction_policy.decoupled
    assert {config.max_batch_size for config in ours.values()} == {16}  # the engine's
    assert ours["postprocessing"].dynamic_batching.preserve_ordering


def test_no_model_has_a_batcher_that_holds_requests_unless_asked_for(tmp_path: Path) -> None:
    """Triton's scheduler_utils.cc: a limit or timeout in the queue policy ends prefetching, and then requests are held.
    The limit is a parameter then; the C++ backend's executor takes it from the policy alone (model_instance_state.cc).
    """
    engines = {kind: hand_made.engine_folder(tmp_path / f"{kind}-engine", cpu=kind == "cpu") for kind in ("cpu", "gpu")}
    for kind, engine in engines.items():
        render(engine, tmp_path / kind, RepositoryOptions(max_queue_size=7))
        ours = configs(tmp_path / kind)
        assert {name: str(one.dynamic_batching) for name, one in ours.items() if one.HasField("dynamic_batching")} == {
            "postprocessing": "preserve_ordering: true\n"
        }
        for model in ("tensorrt_llm", "tensorrt_llm_bls"):
            assert ours[model].parameters["max_queue_size"].string_value == "7"
    asked = RepositoryOptions(max_queue_size=7, executor_queue_policy=True)
    render(engines["gpu"], tmp_path / "asked", asked)
    ours = configs(tmp_path / "asked")
    assert str(ours["tensorrt_llm"].dynamic_batching) == "default_queue_policy {\n  max_queue_size: 7\n}\n"
    assert [finding for finding in check(tmp_path / "asked") if finding.is_error] == []
    path = tmp_path / "asked" / "tensorrt_llm" / "config.pbtxt"
    path.write_text(path.read_text().replace("max_queue_size: 7 }", "max_queue_size: 8 }"))
    found = [finding.field for finding in check(tmp_path / "asked") if finding.is_error]
    assert found == ["dynamic_batching.default_queue_policy.max_queue_size"]
    render(engines["cpu"], tmp_path / "cpu-asked", asked)  # the CPU engine reads the parameter
    assert not configs(tmp_path / "cpu-asked")["tensorrt_llm"].HasField("dynamic_batching")


def test_only_the_backend_and_what_runs_it_differ_between_cpu_and_gpu(tmp_path: Path) -> None:
    for kind in ("cpu", "gpu"):
        engine = hand_made.engine_folder(
            tmp_path / f"{kind}-engine", cpu=kind == "cpu", plugins={"use_paged_context_fmha": True}
        )
        render(engine, tmp_path / kind, RepositoryOptions(), root="/models")
    on_cpu, on_gpu = (configs(tmp_path / kind) for kind in ("cpu", "gpu"))
    engine, text = on_cpu["tensorrt_llm"], on_cpu["tensorrt_llm_bls"]
    engine.backend = "tensorrtllm"
    for tensors in (engine.input, engine.output):  # this GPU engine gathers no logits of prompts
        (there,) = (tensor for tensor in tensors if tensor.name.endswith("context_logits"))
        tensors.remove(there)
    text.parameters["context_logits"].string_value = "none"
    assert on_cpu == on_gpu
    assert list((tmp_path / "gpu" / "tensorrt_llm" / "1").iterdir()) == []
    assert (tmp_path / "gpu" / "ensemble" / "1").is_dir()
    assert (tmp_path / "gpu" / "docker-compose.yaml").is_file()
    assert not (tmp_path / "cpu" / "docker-compose.yaml").exists()


def test_paths_are_rendered_for_the_root_that_the_server_sees(tmp_path: Path) -> None:
    cpu = hand_made.engine_folder(tmp_path / "cpu", cpu=True)
    gpu = hand_made.engine_folder(tmp_path / "gpu", cpu=False)
    for engine, root, seen in ((cpu, None, str(tmp_path / "out")), (gpu, None, "/models"), (cpu, "/a b", "/a b")):
        render(engine, tmp_path / "out", RepositoryOptions(), root=root, force=True)
        ours = configs(tmp_path / "out")
        assert ours["tensorrt_llm"].parameters["gpt_model_path"].string_value == f"{seen}/engine"
        for model in ("preprocessing", "postprocessing", "tensorrt_llm_bls", "tensorrt_llm"):
            assert ours[model].parameters["tokenizer_dir"].string_value == f"{seen}/tokenizer"
    with pytest.raises(UsageError, match="--root models is not absolute"):
        render(cpu, tmp_path / "other", RepositoryOptions(), root="models")


def test_the_logits_type_is_the_engine_s(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False, logits_dtype="float16")
    config = json.loads((engine / "config.json").read_text())
    config["build_config"]["gather_generation_logits"] = True
    (engine / "config.json").write_text(json.dumps(config))
    render(engine, tmp_path / "out", RepositoryOptions(max_logits_bytes=1 << 30))
    for name, config in configs(tmp_path / "out").items():
        types = {t.data_type for t in config.output if t.name in ("context_logits", "generation_logits")}
        assert types == (
            {model_config_pb2.TYPE_FP16} if name in ("tensorrt_llm", "ensemble", "tensorrt_llm_bls") else set()
        )


@pytest.mark.parametrize(
    ("engine", "asked", "expected"),
    [
        ("cpu", None, ("true", "FP32")),
        ("cpu", False, ("false", "FP32")),
        ("gpu", None, ("true", "none")),
        ("gpu that gathers", None, ("false", "FP16")),
        ("gpu that gathers", False, ("false", "FP16")),
        ("gpu that gathers", True, ("true", "none")),  # what comes for reused tokens is no logits
    ],
)
def test_who_wants_the_prompt_s_logits_is_told_whether_they_are_right(
    tmp_path: Path, engine: str, asked: bool | None, expected: tuple[str, str]
) -> None:
    """TensorRT-LLM computes none for tokens from its cache and says so in its log alone (handleContextLogits.cpp of
    1.2: "Because of KV cache reuse, not all context logits could be produced")."""
    reuses, logits = expected
    made = hand_made.engine_folder(
        tmp_path / "engine", cpu=engine == "cpu", logits_dtype="float16",
        build_config={"gather_context_logits": engine == "gpu that gathers"}, plugins={"use_paged_context_fmha": True},
    )  # fmt: skip
    render(made, tmp_path / "out", RepositoryOptions(enable_kv_cache_reuse=asked), copy=True)
    ours = configs(tmp_path / "out")
    assert ours["tensorrt_llm"].parameters["enable_kv_cache_reuse"].string_value == reuses
    assert ours["tensorrt_llm_bls"].parameters["context_logits"].string_value == logits
    assert not [finding for finding in check(tmp_path / "out") if finding.is_error]
    path, key = tmp_path / "out" / "tensorrt_llm" / "config.pbtxt", '"enable_kv_cache_reuse" value: { string_value: '
    other = "false" if reuses == "true" else "true"
    path.write_text(path.read_text().replace(f'{key}"{reuses}"', f'{key}"{other}"'))
    found = [finding.field for finding in check(tmp_path / "out") if finding.is_error]
    assert found == (["parameters context_logits"] if engine == "gpu that gathers" else [])


@pytest.mark.parametrize("offered", [set(), {"context"}, {"generation"}, {"context", "generation"}])
def test_logits_are_offered_where_a_recipe_asks_and_the_engine_has_them(tmp_path: Path, offered: set[str]) -> None:
    """As the contract declares them, in the three models that take requests, and wired through the ensemble."""
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False)
    config = json.loads((engine / "config.json").read_text())
    config["build_config"] |= {f"gather_{kind}_logits": kind in offered for kind in ("context", "generation")}
    (engine / "config.json").write_text(json.dumps(config))
    render(engine, tmp_path / "out", RepositoryOptions(max_logits_bytes=1 << 30))
    names = {f"{before}{kind}_logits" for kind in offered for before in ("", "return_")}
    ours = configs(tmp_path / "out")
    for model in ("tensorrt_llm", "ensemble", "tensorrt_llm_bls"):
        wanted = {
            tensor["name"]: expected(tensor) for side in ("inputs", "outputs") for tensor in CONTRACT[model][side]
        }
        found = {tensor.name: declared(tensor) for tensor in (*ours[model].input, *ours[model].output)}
        assert {name: found[name] for name in found if name in LOGITS} == {name: wanted[name] for name in names}
    step = ours["ensemble"].ensemble_scheduling.step[1]
    assert names == {*step.input_map, *step.output_map} & LOGITS
    assert ours["tensorrt_llm_bls"].parameters["max_logits_bytes"].string_value == str(bool(offered) << 30)


def test_engine_files_are_links_or_copies_and_survive_a_move(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    render(engine, tmp_path / "linked", RepositoryOptions())
    render(engine, tmp_path / "copied", RepositoryOptions(), copy=True)
    name = "openvino/openvino_model.bin"
    assert os.path.samefile(tmp_path / "linked" / "engine" / name, engine / name)
    assert not os.path.samefile(tmp_path / "copied" / "engine" / name, engine / name)
    (tmp_path / "linked").rename(tmp_path / "moved")
    engine.rename(tmp_path / "moved-engine")
    assert (tmp_path / "moved" / "engine" / name).read_bytes() == b"made by hand"


def test_only_tokenizer_files_travel_never_code(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    (engine / "tokenizer" / "tokenization_evil.py").write_text("raise SystemExit")
    render(engine, tmp_path / "out", RepositoryOptions())
    wanted = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "out" / "tokenizer").iterdir()} == wanted | {"generation_config.json"}


def test_the_manifest_tells_the_server_what_it_needs(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False, tp=2)
    render(engine, tmp_path / "out", RepositoryOptions(bls_max_concurrency=64, max_batch_size=4))
    made = manifest.read(tmp_path / "out", "repository")
    assert made.input.digest == manifest.read(engine, "engine").digest
    wanted = {
        "backend": "tensorrtllm", "target": "a100-80gb", "models": list(MODELS), "front": "tensorrt_llm_bls",
        "root": "/models", "decoupled": True, "max_batch_size": 4, "bls_max_concurrency": 64,
        "shm_bytes": 2 << 30, "world_size": 2,
    }  # fmt: skip
    assert {key: made.details[key] for key in wanted} == wanted
    assert made.arguments["options"] == {"max_batch_size": 4, "bls_max_concurrency": 64}


def test_what_cannot_be_served_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    silent = hand_made.engine_folder(tmp_path / "silent", cpu=True, tokenizer=False)
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    cases: list[tuple[Path, RepositoryOptions, type[Exception], str]] = [
        (silent, RepositoryOptions(), EngineError, "holds no tokenizer"),
        (tmp_path, RepositoryOptions(), EngineError, "no engine"),
        (engine, RepositoryOptions(max_batch_size=17), UsageError, "more than the engine's 16"),
        (
            engine,
            RepositoryOptions(parameters={"kv_cache_freee": "1"}),
            UsageError,
            "kv_cache_freee is not a parameter",
        ),
        (engine, RepositoryOptions(parameters={"worker_path": "/x"}), UsageError, "worker_path is not a parameter"),
        (engine, RepositoryOptions(parameters={"cuda_graph_mode": "yes"}), UsageError, "cuda_graph_mode is 'yes'"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            render(source, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
    (engine / "openvino" / "openvino_model.bin").unlink()
    with pytest.raises(EngineError, match=r"lacks openvino/openvino_model\.bin"):
        render(engine, tmp_path / "out", RepositoryOptions())


def test_an_existing_folder_is_kept_without_force(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        render(engine, tmp_path / "out", RepositoryOptions())
    render(engine, tmp_path / "out", RepositoryOptions(), force=True)
    assert (tmp_path / "out" / "ensemble" / "config.pbtxt").is_file()


def test_the_command_prints_a_table_or_one_document(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    done = minitron("render", engine, "--output", tmp_path / "out", "--parameter", "cuda_graph_mode=1", "--json")
    assert json.loads(done.stdout)["backend"] == "python"
    assert configs(tmp_path / "out")["tensorrt_llm"].parameters["cuda_graph_mode"].string_value == "1"
    assert "tensorrt_llm_bls" in minitron("render", engine, "--output", tmp_path / "two").stdout
    wrong = minitron("render", engine, "--output", tmp_path / "three", "--max-queue-size", "-1", check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "max_queue_size" in wrong.stderr and "-1" in wrong.stderr


def test_speculation_is_a_parameter_of_the_cpu_engine_where_it_is_asked_for(tmp_path: Path) -> None:
    cpu, gpu = (hand_made.engine_folder(tmp_path / kind, cpu=kind == "cpu") for kind in ("cpu", "gpu"))
    render(cpu, tmp_path / "plain", RepositoryOptions())
    assert "speculation" not in configs(tmp_path / "plain")["tensorrt_llm"].parameters
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("serving: {speculation: prompt_lookup}\n")
    minitron("render", cpu, "--output", tmp_path / "out", "--recipe", recipe)
    assert configs(tmp_path / "out")["tensorrt_llm"].parameters["speculation"].string_value == "prompt_lookup"
    with pytest.raises(UsageError, match="speculation prompt_lookup is the CPU engine's"):
        render(gpu, tmp_path / "three", RepositoryOptions(speculation="prompt_lookup"))
    with pytest.raises(UsageError, match="speculation is 'draft_model', and 'none' or 'prompt_lookup' is needed"):
        RepositoryOptions(speculation="draft_model")


def test_a_recipe_gives_the_serving_options_and_a_flag_wins(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False)
    recipe = tmp_path / "recipe.yaml"
    serving = "{max_queue_size: 7, executor_queue_policy: true, postprocessing_instances: 3}"
    recipe.write_text(f"serving: {serving}\nmemory: {{kv_cache_fraction: 0.5}}\n")
    minitron("render", engine, "--output", tmp_path / "out", "--recipe", recipe, "--max-queue-size", "9")
    ours = configs(tmp_path / "out")
    assert ours["tensorrt_llm"].parameters["max_queue_size"].string_value == "9"
    assert ours["tensorrt_llm"].dynamic_batching.default_queue_policy.max_queue_size == 9
    assert ours["tensorrt_llm"].parameters["kv_cache_free_gpu_mem_fraction"].string_value == "0.5"
    assert ours["postprocessing"].instance_group[0].count == 3


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_renders_its_reviewed_tree(name: str, tmp_path: Path) -> None:
    repository = golden_repositories.rendered(name, tmp_path)
    golden = golden_repositories.texts(golden_repositories.GOLDEN / name)
    assert golden_repositories.texts(repository) == golden
    for path in repository.glob("*/config.pbtxt"):  # Triton's own protobuf reads every one
        text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    assert [finding for finding in check(repository) if finding.is_error] == []
