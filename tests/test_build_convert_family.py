"""Checkpoints of models without golden data: other head ratios, odd vocabularies, splits, ties, types, shards.

Expected values are computed here from whole tensors, read with the safetensors library, by the sentences of
TensorRT-LLM's converter (concatenate, pad, repeat, split), with the arithmetic of the codes written out once more in
float64; nothing of the planning, cutting and streaming under test takes part.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

import random_model
from minitron.model.shape import ModelShape
from minitron_build.checkpoint import layout
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.read import Checkpoint

Array = npt.NDArray[Any]
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BASE = dataclasses.replace(
    random_model.SHAPES["tiny"], vocab_size=333, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4,
    num_kv_heads=2, max_positions=40,
)  # fmt: skip

#: name: (shape, how its files are written, how it is converted)
CASES: dict[str, tuple[ModelShape, dict[str, Any], dict[str, Any]]] = {
    "one kv head, fewer than ranks": (dataclasses.replace(BASE, num_kv_heads=1), {}, {"tp": 4, "precision": "float16"}),
    "kv heads shared by two ranks": (BASE, {}, {"tp": 4, "precision": "int8_weight_only"}),
    "no sharing of kv heads": (
        dataclasses.replace(BASE, num_kv_heads=4), {}, {"tp": 2, "precision": "int4_weight_only"}),
    "odd vocabulary by rows": (BASE, {}, {"tp": 2, "use_parallel_embedding": True}),
    "odd vocabulary by columns": (BASE, {}, {"tp": 2, "use_parallel_embedding": True, "embedding_sharding_dim": 1}),
    "fewer words than ranks can share": (
        dataclasses.replace(BASE, vocab_size=5), {}, {"tp": 4, "use_parallel_embedding": True}),
    "three pipeline ranks of five layers": (
        dataclasses.replace(BASE, num_layers=5), {}, {"pp": 3, "precision": "float16"}),
    "pipeline and tensor ranks": (BASE, {}, {"tp": 2, "pp": 2, "precision": "int8_weight_only", "dtype": "float16"}),
    "tied embedding": (dataclasses.replace(BASE, tied_embeddings=True), {}, {"tp": 2}),
    "float32 source": (dataclasses.replace(BASE, dtype="float32"), {}, {}),
    "float32 source to bfloat16": (dataclasses.replace(BASE, dtype="float32"), {}, {"precision": "bfloat16"}),
    "float32 source to codes": (dataclasses.replace(BASE, dtype="float32"), {}, {"precision": "int4_weight_only"}),
    "float16 source to bfloat16": (dataclasses.replace(BASE, dtype="float16"), {}, {"precision": "bfloat16"}),
    "many files": (BASE, {"shards": 7}, {"precision": "int8_weight_only"}),
    "transformers 5 spelling, other rotation": (
        dataclasses.replace(BASE, rotary_share=0.25, rotary_base=50000.0), {"spelling": 5}, {}),
    "quantised at build": (BASE, {}, {"precision": "int4_weight_only", "quantize_at_build": True, "tp": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_the_sentences_say(case: str, tmp_path: Path) -> None:
    shape, files, arguments = CASES[case]
    random_model.write_random_model(tmp_path / "model", shape, tokenizer=False, seed=len(case), **files)
    convert(tmp_path / "model", tmp_path / "out", **arguments)
    source: dict[str, Array] = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        source |= load_file(path)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.spec.quantize_at_build == bool(arguments.get("quantize_at_build"))
        for rank in range(checkpoint.spec.world_size):
            expected = _expected(source, shape, rank, **arguments | {"dtype": checkpoint.dtype})
            assert set(checkpoint.names(rank)) == set(expected)
            for name, wanted in expected.items():
                found = checkpoint.array(name, rank)
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
                if wanted.dtype == np.float32:
                    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=name)
                else:
                    assert found.tobytes() == wanted.tobytes(), f"{name} of rank {rank}"


def _expected(
    source: dict[str, Array], shape: ModelShape, rank: int, *, dtype: str, precision: str = "auto", tp: int = 1,
    pp: int = 1, use_parallel_embedding: bool = False, embedding_sharding_dim: int = 0, quantize_at_build: bool = False,
    **_: Any,
) -> dict[str, Array]:  # fmt: skip
    part, stage = rank % tp, rank // tp
    cast = {name: array.astype(np.float32).astype(DTYPES[dtype]) for name, array in source.items()}
    found = _rotary(shape)

    def norm(name: str, origin: str) -> None:
        found[f"{name}.weight"] = (cast[f"{origin}.weight"].astype(np.float64) + 1).astype(DTYPES[dtype])
        found[f"{name}.bias"] = cast[f"{origin}.bias"]

    def linear(name: str, weight: Array) -> None:
        bits = {"int8_weight_only": 8, "int4_weight_only": 4}.get(precision)
        if bits and not quantize_at_build:
            found[f"{name}.weight"], found[f"{name}.per_channel_scale"] = _quantized(weight, bits)
        else:
            found[f"{name}.weight"] = weight

    def rows(weight: Array) -> Array:
        padded = np.pad(weight, ((0, -len(weight) % tp), (0, 0)))
        return np.split(padded, tp)[part]

    def heads(weight: Array) -> Array:
        by_head = weight.reshape(shape.num_kv_heads, shape.head_size, -1)
        return rows(by_head.repeat(max(tp // shape.num_kv_heads, 1), axis=0).reshape(-1, shape.hidden_size))

    embedding = cast["model.embed_tokens.weight"]
    if stage == 0:
        shared = np.split(embedding, tp, axis=1)[part] if embedding_sharding_dim else rows(embedding)
        found["transformer.vocab_embedding.weight"] = shared if use_parallel_embedding else embedding
    for local, index in enumerate(np.array_split(range(shape.num_layers), pp)[stage]):
        name, origin = f"transformer.layers.{local}", f"model.layers.{index}"
        attention = [cast[f"{origin}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        norm(f"{name}.input_layernorm", f"{origin}.input_layernorm")
        norm(f"{name}.post_layernorm", f"{origin}.post_attention_layernorm")
        linear(f"{name}.attention.qkv", np.concatenate([rows(attention[0]), heads(attention[1]), heads(attention[2])]))
        linear(f"{name}.attention.dense", np.split(cast[f"{origin}.self_attn.o_proj.weight"], tp, axis=1)[part])
        linear(f"{name}.mlp.fc", rows(cast[f"{origin}.mlp.up_proj.weight"]))
        linear(f"{name}.mlp.proj", np.split(cast[f"{origin}.mlp.down_proj.weight"], tp, axis=1)[part])
    if stage == pp - 1:
        norm("transformer.ln_f", "model.norm")
        found["lm_head.weight"] = rows(cast.get("lm_head.weight", embedding))
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _quantized(weight: Array, bits: int) -> tuple[Array, Array]:
    """Codes and scales in float64; the quotient is rounded to float32 once, as a float32 division does."""
    exact, top = weight.astype(np.float64), 2 ** (bits - 1)
    steps = np.abs(exact).max(axis=1) / top
    ratio = np.divide(exact, steps[:, None]).astype(np.float32).astype(np.float64)
    rounded = np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)
    codes = np.clip(rounded, -top, top - 1).astype(np.int8)
    return layout.pack(codes, bits), steps.astype(weight.dtype)


def _rotary(shape: ModelShape) -> dict[str, Array]:
    """The three tables in float64, written out element by element."""
    half, positions = shape.rotary_size // 2, shape.max_positions
    inverse = [shape.rotary_base ** (-2 * j / shape.rotary_size) for j in range(half)]
    plain = [10000.0 ** (-2 * j / shape.rotary_size) for j in range(half)]
    sines = [[f(p * w) for f in (np.sin, np.cos) for w in plain] for p in range(positions)]
    pairs = [f(p * w) for p, w in itertools.product(range(positions), inverse) for f in (np.cos, np.sin)]
    return {
        "rotary_inv_freq": np.array(inverse, np.float32),
        "embed_positions": np.array([sines], np.float32),
        "embed_positions_for_gpt_attention": np.array([pairs], np.float32),
    }
