"""One decoder layer of a Nemotron in float32 numpy, seen from inside: what each linear weight is multiplied with.

The arithmetic is transformers' ``modeling_nemotron.py``; the rotation is that of TensorRT-LLM's tables. Weights are
under the names of Hugging Face without ``model.layers.N.``, norms with their + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minitron.model.shape import ModelShape

Floats = npt.NDArray[np.float32]
#: Called with a name and rows [tokens, features]: the input of ``qkv``, ``dense``, ``fc`` and ``proj`` (each linear
#: module of TensorRT-LLM's checkpoint), and ``keys`` (rotated) and ``values``.
Seen = Callable[[str, Floats], None]

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
DENSE, FC, PROJ = "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
#: The source's matrices behind each linear module; those of one module have one input.
MODULES: Mapping[str, tuple[str, ...]] = {"qkv": QKV, "dense": (DENSE,), "fc": (FC,), "proj": (PROJ,)}
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Layer:
    """A layer of a model of ``shape`` with its ``weights``; called with the hidden states of texts of one length."""

    shape: ModelShape
    weights: Mapping[str, Floats]

    def __call__(self, hidden: Floats, seen: Seen) -> Floats:
        """Hidden states [texts, tokens, hidden] after the layer, of those before it."""
        rows = hidden.reshape(-1, hidden.shape[2])
        rows = rows + self._attention(self._norm("input_layernorm", rows), len(hidden), seen)
        rows += self._mlp(self._norm("post_attention_layernorm", rows), seen)
        return rows.reshape(hidden.shape)

    def _mlp(self, normed: Floats, seen: Seen) -> Floats:
        seen("fc", normed)
        rectified = normed @ self.weights[FC].T
        np.maximum(rectified, np.float32(0), out=rectified)
        np.multiply(rectified, rectified, out=rectified)
        seen("proj", rectified)
        return np.asarray(rectified @ self.weights[PROJ].T)

    def _attention(self, normed: Floats, texts: int, seen: Seen) -> Floats:
        shape, tokens = self.shape, len(normed) // texts
        seen("qkv", normed)
        query, key, value = (
            (normed @ self.weights[name].T).reshape(texts, tokens, -1, shape.head_size) for name in QKV
        )
        query, key = self._rotated(query), self._rotated(key)
        seen("keys", key)
        seen("values", value)
        query *= np.float32(shape.head_size**-0.5)
        later = np.where(np.tri(tokens, dtype=bool), np.float32(0), np.float32(-np.inf))
        mixed, group = np.empty_like(query), shape.num_heads // shape.num_kv_heads
        for text in range(texts):
            for head in range(shape.num_heads):
                scores = query[text, :, head] @ key[text, :, head // group].T
                scores += later
                scores -= scores.max(axis=1, keepdims=True)
                np.exp(scores, out=scores)
                mixed[text, :, head] = scores @ value[text, :, head // group] / scores.sum(axis=1, keepdims=True)
        joined = mixed.reshape(len(normed), -1)
        seen("dense", joined)
        return np.asarray(joined @ self.weights[DENSE].T)

    def _norm(self, name: str, hidden: Floats) -> Floats:
        centred = hidden - hidden.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True) + np.float32(self.shape.norm_epsilon)
        scaled = centred / np.sqrt(variance) * self.weights[f"{name}.weight"]
        return np.asarray(scaled + self.weights[f"{name}.bias"])

    def _rotated(self, heads: Floats) -> Floats:
        """Turn the first elements of every head of [texts, tokens, heads, head], in halves (GPT-NeoX order)."""
        size, half = self.shape.rotary_size, self.shape.rotary_size // 2
        inverse = np.float32(1) / (self.shape.rotary_base ** (np.arange(half) / half)).astype(np.float32)
        angles = np.arange(heads.shape[1], dtype=np.float32)[:, None, None] * inverse
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = heads[..., :half], heads[..., half:size]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, heads[..., size:]], axis=3)
