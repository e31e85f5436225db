"""Checkpoints of ModelOpt 0.47.0 (``make_modelopt_fixtures.py``): read and run, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import modelopt_cases as cases
from conftest import SMALL_MODEL, minitron_here
from minitron.errors import CheckpointError
from minitron.model.precision import Precision
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.checkpoint.write import header
from minitron_build.engines.openvino import write as cpu

DATA = Path(__file__).parent / "data" / "modelopt"
INDEX = json.loads((DATA / "index.json").read_text(encoding="utf-8"))
LOGIT_ERROR = 1e-4


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """An export as a folder: the one that was kept, else its config.json and zeros of its tensors' types and shapes."""

    def get(name: str, **changes: Any) -> Path:
        folder, case = tmp_path / name, INDEX["cases"][name]
        if (DATA / name).is_dir():
            shutil.copytree(DATA / name, folder)
        else:
            folder.mkdir()
            for rank, tensors in enumerate(case["ranks"]):
                planned = [_Stored(key, *entry) for key, entry in tensors.items()]
                content = header(planned) + b"\0" * sum(each.nbytes for each in planned)  # type: ignore[arg-type]
                (folder / f"rank{rank}.safetensors").write_bytes(content)
        config = case["config"] | {"quantization": case["config"]["quantization"] | changes}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return get


class _Stored:
    def __init__(self, name: str, dtype: str, shape: list[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.nbytes = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I8": 1, "F8_E4M3": 1}[dtype]


@pytest.mark.parametrize(
    ("name", "precision", "group", "kv"),
    [
        ("int4_awq-tp1", Precision.INT4_AWQ, 128, None), ("int4_awq_64-tp2", Precision.INT4_AWQ, 64, None),
        ("fp8-tp1", Precision.FP8, None, None), ("fp8-tp2", Precision.FP8, None, None),
        ("int8_sq-tp1", Precision.INT8_SQ, None, None), ("int8_sq-tp2", Precision.INT8_SQ, None, None),
        ("w4a8_awq-tp1", Precision.W4A8_AWQ, 128, None), ("bf16_int8_kv-tp1", Precision.BFLOAT16, None, "INT8"),
    ],
)  # fmt: skip
def test_an_export_is_read(
    name: str, precision: Precision, group: int | None, kv: str | None, export: Callable[..., Path]
) -> None:
    with Checkpoint.open(export(name)) as found:
        spec = found.spec
        assert (spec.precision, spec.group_size, spec.kv_cache) == (precision, group, kv)
        assert (spec.tp, spec.pp, spec.dtype) == (int(name[-1]), 1, "bfloat16")
        assert found.config["producer"] == {"name": "modelopt", "version": "0.47.0"}  # extras are kept


def _logits(folder: Path, engine: Path) -> Any:
    from minitron.machine.openvino import process_core

    cpu.build(folder, engine, cpu.CpuOptions())
    xml = engine / "openvino" / "openvino_model.xml"
    request = process_core().compile_model(str(xml), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"}).create_infer_request()

    def run(ids: list[int], past: int) -> Any:
        return request.infer({
            "input_ids": np.array([ids]), "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids))[None], "beam_idx": np.zeros(1, np.int32),
        })["logits"][0]  # fmt: skip

    whole = run(cases.PROMPT, 0).copy()
    request.reset_state()
    return whole, np.concatenate([run([token], place) for place, token in enumerate(cases.PROMPT)])


@pytest.mark.parametrize("name", ["int4_awq-tp1", "given_128-tp1", "given_64-tp1", "int4_blockwise-tp1"])
def test_an_engine_is_transformers_on_the_exported_weights(
    name: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    """Single rows too: the plugin has other code for them."""
    folder = export(name, **({"pre_quant_scale": False} if "blockwise" in name else {}))
    wanted = np.load(DATA / name / "logits.npy")
    for found in _logits(folder, tmp_path / "engine"):
        assert np.abs(found - wanted).max() < LOGIT_ERROR
        assert (found.argmax(1) == wanted.argmax(1)).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int4_blockwise-tp1", "pre_quant_scale true.*INT4_BLOCKWISE.*write false there"),
        ("int8_wo-tp1", r"as \[out, in\].*convert the model itself with --precision int8_weight_only"),
    ],
)
def test_what_tensorrt_llm_does_not_load_is_refused_with_the_reason(
    name: str, said: str, export: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(export(name))


@pytest.mark.parametrize("changes", [
    {"has_zero_point": True}, {"group_size": 32}, {"activation_scheme": "dynamic"}, {"quant_algo": "W4A16_GPTQ"},
    {"exclude_modules": ["lm_head", "transformer.layers.0.mlp.fc"]}, {"exclude_modules": []}, {"clamp_val": [0.0, 1.0]},
    {"kv_cache_quant_algo": "NVFP4"}, {"kv_cache_quant_algo": "INT8"},
])  # fmt: skip
def test_a_key_that_changes_the_model_is_refused_by_its_name(
    changes: dict[str, Any], export: Callable[..., Path]
) -> None:
    name = next(iter(changes)).replace("group_size", "group-size")
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(export("int4_awq-tp1", **changes))


@pytest.mark.parametrize("name", ["fp8-tp1", "int8_sq-tp1", "w4a8_awq-tp1"])
def test_eight_bit_activations_are_refused_on_a_cpu(name: str, export: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="products are of 8-bit activations, which a CPU engine has not"):
        cpu.build(export(name), tmp_path / "engine", cpu.CpuOptions())
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("int8_sq-tp1", "a100-80gb", ""), ("int4_awq_64-tp2", "a100-80gb", ""), ("fp8-tp1", "l40s-48gb", ""),
        ("int4_awq-tp1", "h100-80gb", ""), ("bf16_int8_kv-tp1", "a100-80gb", ""),
        ("fp8-tp1", "a100-80gb", "fp8 needs a GPU of compute capability 8.9"),
        ("w4a8_awq-tp1", "a100-80gb", "w4a8_awq needs a GPU of compute capability 8.9"),
    ],
)  # fmt: skip
def test_what_trtllm_build_takes_is_planned_and_passed_on(
    name: str, target: str, said: str, export: Callable[..., Path]
) -> None:
    asked = ["build", str(export(name)), "--target", target, "--container", "--dry-run", "--json"]
    code, out, err = minitron_here(*asked)
    if said:
        assert code == 2 and said in err
        return
    assert code == 0, err
    argv = json.loads(out)["argv"]
    assert "trtllm-build" in argv and argv[argv.index("--checkpoint_dir") + 1] == "/checkpoint"


def test_trtllm_build_is_given_the_folder_as_it_is(export: Callable[..., Path], doubles: Path) -> None:
    """The double of trtllm-build asks for the names and shapes of TensorRT-LLM's group-wise linear module."""
    code, out, err = minitron_here(
        "build", export("given_128-tp1"), "--recipe", "a100-int4-awq", "--output", doubles / "engine", "--json",
        "--max-seq-len", "64", "--max-input-len", "32", "--input-tokens", "32", "--output-tokens", "32",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((doubles / "engine" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_config"]["quantization"]["quant_algo"] == "W4A16_AWQ"
    assert json.loads(out)["precision"] == "int4_awq"


def test_the_engine_keeps_the_tokenizer_that_was_given(export: Callable[..., Path], tmp_path: Path) -> None:
    given = tmp_path / "tokenizer"
    given.mkdir()
    words = {f"word{number}": number for number in range(100)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    tokenizer.save(str(given / "tokenizer.json"))
    (given / "config.json").write_text(json.dumps({"eos_token_id": 3, "model_type": "nemotron"}), encoding="utf-8")
    folder = export("int4_awq-tp1")
    code, out, err = minitron_here("build", folder, "--tokenizer", given, "--output", tmp_path / "engine", "--json")
    assert code == 0 and json.loads(out)["has_tokenizer"], err
    kept = tmp_path / "engine" / "tokenizer"
    assert (kept / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    assert json.loads((kept / "generation_config.json").read_text())["eos_token_id"] == 3
    # Another tokenizer is another engine; the same one is found.
    assert json.loads(
        minitron_here("build", folder, "--tokenizer", given, "--output", tmp_path / "engine", "--json")[1]
    )["cached"]
    assert minitron_here("build", folder, "--output", tmp_path / "engine")[0] != 0
    code, _, err = minitron_here("build", folder, "--tokenizer", SMALL_MODEL, "--output", tmp_path / "other")
    assert code != 0 and "ids up to 1023" in err  # ids that this model has not


def test_inspect_says_what_it_is(export: Callable[..., Path]) -> None:
    code, out, _ = minitron_here("inspect", export("int8_sq-tp2"), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["quant_algo"] == "W8A8_SQ_PER_CHANNEL" and found["tp"] == 2 and found["precision"] == "int8_sq"
    assert {tensor["rank"] for tensor in found["tensors"]} == {0, 1}
