"""The generator of random models: files as transformers writes them, in bounded memory, servable."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from safetensors import safe_open
from tokenizers import Tokenizer

import random_model
import tokenizer_files
from conftest import DATA, ROOT
from minitron.model import shape as model_shape
from nemotron_reference import source_weights

TINY = random_model.SHAPES["tiny"]
GOLDEN_MODEL = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"


def test_names_and_shapes_are_those_of_a_model_that_transformers_saved() -> None:
    """The golden model a was saved by transformers."""
    shape = model_shape.read(GOLDEN_MODEL / "config.json")
    with safe_open(GOLDEN_MODEL / "model.safetensors", "numpy") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in random_model.tensors(shape)} == saved


def test_the_4b_preset_has_the_parameters_of_minitron_4b() -> None:
    """Matrices of 2.617 G in the layers and 1.573 G in embedding and head (contract, Minitron-4B-Base numbers)."""
    shape = random_model.SHAPES["minitron-4b"]
    members = list(random_model.tensors(shape))
    matrices = {tensor.name: tensor.length for tensor in members if len(tensor.shape) == 2}
    ends = matrices["model.embed_tokens.weight"] + matrices["lm_head.weight"]
    assert round(ends / 1e9, 3) == 1.573
    assert round((sum(matrices.values()) - ends) / 1e9, 3) == 2.617
    assert sum(tensor.length for tensor in members) == shape.parameters


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_of_a_real_models_kind(tmp_path: Path, dtype: str) -> None:
    """Magnitudes, norms that do something, and distinct rows in a matrix longer than the pool of random numbers."""
    shape = dataclasses.replace(TINY, dtype=dtype, vocab_size=17001)
    random_model.write_random_model(tmp_path / "m", shape, tokenizer=False)
    weights = source_weights(tmp_path / "m")
    embedding = weights["model.embed_tokens.weight"]
    assert abs(embedding.std() * TINY.hidden_size**0.5 - 1) < 0.02
    assert len(np.unique(embedding, axis=0)) == 17001
    norms = [value for name, value in weights.items() if "norm" in name]
    assert norms
    assert all(0.01 < value.std() < 0.2 and abs(value.mean()) < 0.1 for value in norms)


def test_same_arguments_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        random_model.write_random_model(tmp_path / name, TINY, seed=seed)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} <= files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    one, other = (source_weights(tmp_path / name) for name in ("one", "other"))
    assert not any(np.array_equal(one[name], other[name]) for name in one)


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    random_model.write_random_model(tmp_path / "one", TINY, tokenizer=False)
    random_model.write_random_model(tmp_path / "many", TINY, shards=4, tokenizer=False)
    one, many = source_weights(tmp_path / "one"), source_weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == TINY.parameters * 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "numpy") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize("spelling", [4, 5])
def test_the_shape_comes_back_from_either_spelling(tmp_path: Path, spelling: int) -> None:
    shape = dataclasses.replace(TINY, rotary_share=0.25, rotary_base=77.0, tied_embeddings=True, dtype="float16")
    random_model.write_random_model(tmp_path / "m", shape, spelling=spelling, tokenizer=False)
    assert model_shape.read(tmp_path / "m" / "config.json") == shape
    assert "lm_head.weight" not in source_weights(tmp_path / "m")
    assert ("rope_parameters" in random_model.hugging_face_config(shape, spelling)) == (spelling == 5)


def test_memory_stays_bounded_however_large_the_model(tmp_path: Path) -> None:
    """The command line, on a model of 0.4 GB: what it held at most was a fraction of that."""
    arguments = ["--output", str(tmp_path / "m"), "--hidden-size", "1024", "--vocab-size", "100003", "--no-tokenizer"]
    program = (
        f"import sys; sys.argv[1:] = {arguments}; import random_model; code = random_model.main();"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]); sys.exit(code)"
    )
    path = [str(ROOT / "models"), str(ROOT / "core")]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {program}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 400_000_000
    assert int(done.stdout) * 1024 < 200_000_000


def test_every_id_of_a_filled_up_tokenizer_decodes(tmp_path: Path) -> None:
    shape = dataclasses.replace(TINY, vocab_size=2999)
    random_model.write_random_model(tmp_path / "m", shape)
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    original = Tokenizer.from_file(str(random_model.SMALL_MINITRON / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2999
    assert tokenizer.decode([2998, 2000]) == "<2998> <2000>"
    assert all(tokenizer.decode([5, i], skip_special_tokens=False) for i in range(2999))
    text = "And God said, Let there be <2000> lights, naïve 日本 <2998>"
    assert tokenizer.encode(text).ids == original.encode(text).ids
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m" / "tokenizer.model"))
    assert model.vocab_size() == 2999
    assert model.decode([2998, 2000]) == "<2998> <2000>"
    assert model.encode(text) == tokenizer.encode(text).ids
    assert [i for i in range(2999) if model.is_unused(i)] == list(range(original.get_vocab_size(), 2999))


def test_a_vocabulary_below_the_tokenizers_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(tokenizer_files.TokenizerTooLarge, match="without a tokenizer"):
        random_model.write_random_model(tmp_path / "m", dataclasses.replace(TINY, vocab_size=300))
    assert list(tmp_path.iterdir()) == []
