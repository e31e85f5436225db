"""Nemotron in plain numpy, and what the weights of a checkpoint mean: the reference of tests that have no torch.

Weights are dictionaries of float32 arrays under Hugging Face's names, norms as LayerNorm1P stores them (weight - 1),
so that transformers' NemotronForCausalLM and ``logits`` take the same. Written from transformers'
modeling_nemotron.py (the arithmetic) and the description of TensorRT-LLM's checkpoint (casts, codes, scales); nothing
here is imported from the code under test but the reader of checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from minitron.model.precision import Precision
from minitron.model.shape import ModelShape
from minitron_build.checkpoint.layout import unpack
from minitron_build.checkpoint.read import Checkpoint

Array = NDArray[np.float32]
Weights = dict[str, Array]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def source_weights(model: Path) -> Weights:
    """Read a Hugging Face folder's weights, unrounded."""
    weights: Weights = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            weights |= {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    return weights


def rounded_weights(source: Mapping[str, Array], precision: Precision, dtype: str) -> Weights:
    """What a checkpoint of ``precision`` and ``dtype`` makes of the source's weights, in float32.

    Everything is cast to ``dtype`` first; a norm's weight + 1 is rounded once more; linear weights of the weight-only
    precisions become code * scale, per output row.
    """
    held = _DTYPES[dtype]
    weights: Weights = {}
    for name, value in source.items():
        cast = value.astype(held)
        if name.endswith("norm.weight"):
            weights[name] = (cast + held(1)).astype(np.float32) - 1
        elif precision.is_weight_only and name.split(".")[-2] in LINEAR:
            weights[name] = _through_codes(cast.astype(np.float32), precision.weight_bits, held)
        else:
            weights[name] = cast.astype(np.float32)
    return weights


def _through_codes(weight: Array, bits: int, held: Any) -> Array:
    """Quantise rows symmetrically to ``bits`` and back: the unrounded scale divides, the rounded one multiplies."""
    limit = 2 ** (bits - 1)
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(limit)
    ratio = np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 0)
    codes = np.clip(np.trunc(ratio + np.copysign(np.float32(0.5), ratio)), -limit, limit - 1)
    dequantised: Array = codes * scale.astype(held).astype(np.float32)
    return dequantised


def checkpoint_weights(folder: Path) -> Weights:
    """Read a one-rank checkpoint back: layout, quantisation, norm offset and QKV fusion undone."""
    with Checkpoint.open(folder) as checkpoint:
        bits = checkpoint.precision.weight_bits
        stored = {name: checkpoint.array(name) for name in checkpoint.names()}
        shape = checkpoint.shape

    def linear(name: str) -> Array:
        value = stored[f"{name}.weight"]
        if f"{name}.weights_scaling_factor" in stored:
            return _through_groups(value, stored[f"{name}.weights_scaling_factor"]) * stored.get(
                f"{name}.prequant_scaling_factor", np.ones(value.shape[1])
            ).astype(np.float32)
        if f"{name}.per_channel_scale" not in stored:
            return value.astype(np.float32)
        scale = stored[f"{name}.per_channel_scale"].astype(np.float32)
        return unpack(value, bits).astype(np.float32) * scale[:, None]

    def norm(name: str, hugging_face: str) -> Weights:
        weight, bias = (stored[f"{name}.{part}"].astype(np.float32) for part in ("weight", "bias"))
        return {f"{hugging_face}.weight": weight - 1, f"{hugging_face}.bias": bias}

    weights = {
        "model.embed_tokens.weight": linear("transformer.vocab_embedding"),
        "lm_head.weight": linear("lm_head"),
    } | norm("transformer.ln_f", "model.norm")
    kv_rows = shape.num_kv_heads * shape.head_size
    for i in range(shape.num_layers):
        ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
        qkv = np.split(linear(f"{ours}.attention.qkv"), [shape.hidden_size, shape.hidden_size + kv_rows])
        weights |= {f"{theirs}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", qkv, strict=True)}
        weights[f"{theirs}.self_attn.o_proj.weight"] = linear(f"{ours}.attention.dense")
        weights[f"{theirs}.mlp.up_proj.weight"] = linear(f"{ours}.mlp.fc")
        weights[f"{theirs}.mlp.down_proj.weight"] = linear(f"{ours}.mlp.proj")
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights |= norm(f"{ours}.{name.replace('attention_', '')}", f"{theirs}.{name}")
    return weights


def _through_groups(stored: NDArray[np.int8], scales: Array) -> Array:
    """Weights of W4A16_AWQ: a byte holds two output channels, the even one low; a scale is for a group of inputs."""
    nibbles = np.stack([stored.view(np.uint8) & 15, stored.view(np.uint8) >> 4], axis=1).reshape(-1, stored.shape[1])
    codes = np.where(nibbles > 7, nibbles.astype(np.int16) - 16, nibbles)
    return np.asarray(codes * scales.repeat(stored.shape[1] // scales.shape[1], axis=1), np.float32)


def logits(
    weights: Mapping[str, Array],
    shape: ModelShape,
    ids: NDArray[np.int64],
    seen: Callable[[str, int, Array], object] = lambda kind, layer, values: None,
) -> Array:
    """Logits [token, vocabulary] of a prompt, in float32; ``seen`` gets fc, proj and residual of each layer."""
    hidden = weights["model.embed_tokens.weight"][ids]
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        hidden = hidden + _attention(weights, shape, layer, _norm(weights, shape, f"{layer}.input_layernorm", hidden))
        normed = _norm(weights, shape, f"{layer}.post_attention_layernorm", hidden)
        seen("residual", i, hidden)
        rectified = np.maximum(normed @ weights[f"{layer}.mlp.up_proj.weight"].T, 0)
        projected = rectified**2 @ weights[f"{layer}.mlp.down_proj.weight"].T
        hidden = hidden + projected
        for kind, values in (("fc", rectified), ("proj", projected), ("residual", hidden)):
            seen(kind, i, values)
    return np.asarray(_norm(weights, shape, "model.norm", hidden) @ weights["lm_head.weight"].T)


def _norm(weights: Mapping[str, Array], shape: ModelShape, name: str, hidden: Array) -> Array:
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(shape.norm_epsilon))
    return np.asarray(centred / deviation * (weights[f"{name}.weight"] + 1) + weights[f"{name}.bias"])


def _attention(weights: Mapping[str, Array], shape: ModelShape, layer: str, hidden: Array) -> Array:
    length, size = len(hidden), shape.head_size
    q, k, v = (
        (hidden @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).reshape(length, -1, size).swapaxes(0, 1)
        for name in "qkv"
    )
    q, k = _rotate(q, shape), _rotate(k, shape)
    shared_by = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat(shared_by, axis=0), v.repeat(shared_by, axis=0)
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(size))
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ v
    return np.asarray(mixed.swapaxes(0, 1).reshape(length, -1) @ weights[f"{layer}.self_attn.o_proj.weight"].T)


def _rotate(heads: Array, shape: ModelShape) -> Array:
    """Turn the first ``rotary_size`` elements of every head, paired half a rotary size apart (GPT-NeoX)."""
    rotated, half = shape.rotary_size, shape.rotary_size // 2
    frequencies = 1 / shape.rotary_base ** (np.arange(half, dtype=np.float64) / half)
    angles = np.arange(heads.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second, rest = heads[..., :half], heads[..., half:rotated], heads[..., rotated:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


Model = tuple[Weights, ModelShape]


def _without_norm_offset(weights: Weights, shape: ModelShape) -> Model:
    return {name: w - 1 if name.endswith("norm.weight") else w for name, w in weights.items()}, shape


def _whole_heads_rotated(weights: Weights, shape: ModelShape) -> Model:
    return weights, dataclasses.replace(shape, rotary_share=1.0)


def _half_the_rotary_share(weights: Weights, shape: ModelShape) -> Model:
    return weights, dataclasses.replace(shape, rotary_share=shape.rotary_share / 2)


def _other_rotary_base(weights: Weights, shape: ModelShape) -> Model:
    return weights, dataclasses.replace(shape, rotary_base=shape.rotary_base * 10)


def _qkv_in_another_order(weights: Weights, shape: ModelShape) -> Model:
    """Fused as q, v, k; read as q, k, v."""
    swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return {name: weights[_renamed(name, swapped)] for name in weights}, shape


def _qkv_interleaved_by_head(weights: Weights, shape: ModelShape) -> Model:
    """Fused group by group (query heads, key head, value head) as other GPT variants are; read as q, k, v."""
    groups, size = shape.num_kv_heads, shape.head_size
    mutated = dict(weights)
    for i in range(shape.num_layers):
        names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        parts = [weights[name].reshape(groups, -1, shape.hidden_size) for name in names]
        fused = np.concatenate(parts, axis=1).reshape(-1, shape.hidden_size)
        cuts = np.split(fused, [shape.hidden_size, shape.hidden_size + groups * size])
        mutated |= dict(zip(names, cuts, strict=True))
    return mutated, shape


def _renamed(name: str, renaming: Mapping[str, str]) -> str:
    parts = name.split(".")
    return ".".join(renaming.get(part, part) for part in parts)


#: What could be wrong with a checkpoint or an engine, by name: each turns a right model into a wrong one.
MUTATIONS: dict[str, Callable[[Weights, ModelShape], Model]] = {
    "norm weight without its + 1": _without_norm_offset,
    "whole heads rotated": _whole_heads_rotated,
    "half the rotary share": _half_the_rotary_share,
    "another rotary base": _other_rotary_base,
    "q, v, k": _qkv_in_another_order,
    "q, k, v interleaved by head": _qkv_interleaved_by_head,
}
