"""The repository for the LLM API: rendered from a Hugging Face folder, checked, and served with a stand-in package.

Tensors are held against tests/data/triton_tensors.json; the stand-in (doubles/tensorrt_llm) raises on any argument of
the LLM API that is not on its reviewed list.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conftest import DATA, SMALL_MODEL, minitron
from serving import Stream, server

CONTRACT = json.loads((DATA / "triton_tensors.json").read_text())["models"]["llmapi_tensorrt_llm"]
MODEL = "tensorrt_llm"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the small Minitron, to be seen where it lies."""
    folder = tmp_path_factory.mktemp("llmapi") / "repository"
    minitron("render", SMALL_MODEL, "--recipe", "a100-llmapi", "--output", folder, "--root", folder)
    return folder


def test_declared_tensors_are_those_of_the_contract(repository: Path) -> None:
    config = text_format.Parse((repository / MODEL / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    for side in ("input", "output"):
        wanted = {t["name"]: (t["dtype"], t["dims"], t["optional"]) for t in CONTRACT[side + "s"] if "since" not in t}
        found = {
            t.name: (model_config_pb2.DataType.Name(t.data_type)[5:], list(t.dims), getattr(t, "optional", False))
            for t in getattr(config, side)
        }
        assert found == wanted
    assert config.max_batch_size == 0


def test_model_yaml_says_what_the_recipe_says(repository: Path) -> None:
    raw = yaml.safe_load((repository / MODEL / "1" / "model.yaml").read_text())
    assert raw["model"] == f"{repository}/model"
    assert (raw["backend"], raw["dtype"], raw["tensor_parallel_size"]) == ("pytorch", "bfloat16", 1)
    assert raw["triton_config"]["decoupled"] is True and raw["triton_config"]["max_batch_size"] == 0
    assert set(raw["triton_config"]) == set(CONTRACT["model_yaml"]["triton_config"])
    assert (repository / "model" / "model.safetensors").is_file()
    assert (repository / "docker-compose.yaml").is_file()
    assert "--disable-auto-complete-config" not in (repository / "docker-compose.yaml").read_text()


def test_weight_only_is_refused_by_name(tmp_path: Path) -> None:
    done = minitron("render", SMALL_MODEL, "--recipe", "a100-llmapi", "--precision", "int8_weight_only",
                    "--output", tmp_path / "out", check=False)  # fmt: skip
    assert done.returncode in {2, 3}
    assert "int8_weight_only needs a TensorRT engine" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_check_names_what_is_wrong(repository: Path, tmp_path: Path) -> None:
    assert minitron("check", repository).returncode == 0
    broken = shutil.copytree(repository, tmp_path / "broken")
    path = broken / MODEL / "1" / "model.yaml"
    path.write_text(path.read_text().replace("dtype: bfloat16", "dtype: int8\nspeed: high"))
    config = broken / MODEL / "config.pbtxt"
    batcher = "dynamic_batching { preserve_ordering: true }"
    config.write_text(config.read_text().replace('"sampling_param_seed"', '"seed"') + batcher)
    document = json.loads(minitron("check", broken, "--json", check=False).stdout)
    places = {(finding["file"], finding["field"]) for finding in document["findings"]}
    yaml_file = "tensorrt_llm/1/model.yaml"
    where = "tensorrt_llm/config.pbtxt"
    assert {(yaml_file, "dtype"), (yaml_file, "speed"), (where, "input seed"),
            (where, "dynamic_batching.preserve_ordering")} <= places  # fmt: skip


def test_check_refuses_a_key_that_stands_twice(repository: Path, tmp_path: Path) -> None:
    """PyYAML keeps the last of two, and a reader of the file may see the first."""
    broken = shutil.copytree(repository, tmp_path / "broken")
    path = broken / MODEL / "1" / "model.yaml"
    path.write_text("max_batch_size: 8\n" + path.read_text() + "max_batch_size: 8\n")
    assert "key 'max_batch_size' stands twice" in minitron("check", broken, check=False).stdout


@pytest.fixture(scope="module")
def stream(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    """A stream to the bundled server that runs our model over the stand-in."""
    shutil.copytree(Path(__file__).parent / "doubles" / "tensorrt_llm", repository / MODEL / "1" / "tensorrt_llm")
    with server(repository, "--server", "bundled", "--exit-timeout", "10") as document:
        one = Stream(document["urls"]["grpc"])
        yield one
        one.close()


def ask(stream: Stream, text: str, **inputs: Any) -> list[dict[str, Any]]:
    return stream.responses(MODEL, text_input=np.array([text.encode()], dtype=object), **_vectors(inputs))


def _vectors(inputs: dict[str, Any]) -> dict[str, Any]:
    """Values as tensors of rank 1: this model has no batch axis."""
    kinds = {bool: np.bool_, int: np.int32, float: np.float32, str: object}
    return {
        name: np.array([value.encode() if isinstance(value, str) else value], dtype=kinds[type(value)])
        for name, value in inputs.items()
    }


@pytest.mark.server
def test_whole_and_streamed_answers(stream: Stream) -> None:
    whole = ask(stream, "one two", sampling_param_max_tokens=5, return_finish_reason=True)
    assert [(r["text_output"].tolist(), r["finish_reason"].tolist()) for r in whole] == [
        ([b" one two one two one"], [b"length"])
    ]
    pieces = ask(stream, "one two", sampling_param_max_tokens=3, streaming=True, return_cumulative_logprob=True)
    assert [r["text_output"].tolist() for r in pieces] == [[b" one"], [b" one two"], [b" one two one"]]
    assert [r["cumulative_logprob"].tolist() for r in pieces] == [[-0.5], [-1.0], [-1.5]]
    stopped = ask(stream, "one two", sampling_param_max_tokens=9, sampling_param_stop="two", return_stop_reason=True)
    assert stopped[0]["stop_reason"].tolist() == [b"two"] and stopped[0]["text_output"].tolist() == [b" one "]
    for streams in (False, True):  # an end token is no text, and ends it
        asked = {"sampling_param_max_tokens": 9, "return_finish_reason": True, "streaming": streams}
        for prompt, text in (("one two </s> three", b" one two"), ("</s> one", b"")):
            last = ask(stream, prompt, **asked)[-1]
            assert (last["text_output"].tolist(), last["finish_reason"].tolist()) == ([text], [b"stop"])
    told = ask(stream, "one", sampling_param_max_tokens=1, sampling_param_exclude_input_from_output=False)
    assert told[0]["text_output"].tolist() == [b"one one"]


@pytest.mark.server
def test_errors_are_one_line_and_the_next_request_is_fine(stream: Stream) -> None:
    text = np.array([b"one"], dtype=object)
    refused = stream.error(MODEL, text_input=text, **_vectors({"sampling_param_max_tokens": 5000}))
    assert refused == "max_tokens does not fit"
    two = stream.error(MODEL, text_input=np.array([b"one", b"two"], dtype=object))
    assert "2 prompts, and one is needed" in two
    assert ask(stream, "one", sampling_param_max_tokens=1)[0]["text_output"].tolist() == [b" one"]


@pytest.mark.server
def test_stop_by_request_id_and_a_client_that_leaves(stream: Stream) -> None:
    slow = _vectors({"sampling_param_max_tokens": 900, "sampling_param_temperature": 20.0, "streaming": True})
    own = stream.another()
    own.ask(MODEL, "mine", text_input=np.array([b"one"], dtype=object), **slow)
    own.next()
    begun = time.monotonic()
    stream.ask(MODEL, "mine", text_input=np.array([b""], dtype=object), **_vectors({"stop": True}))
    assert stream.next() == ({}, None, True)
    error = None
    while error is None:
        _, error, final = own.next()
        assert not final or error
    assert "cancelled" in error
    own.close()
    leaving = stream.another()
    leaving.ask(MODEL, "", text_input=np.array([b"one"], dtype=object), **slow)
    leaving.next()
    leaving.close(cancel=True)
    assert time.monotonic() - begun < 15  # neither ran its 18 s
