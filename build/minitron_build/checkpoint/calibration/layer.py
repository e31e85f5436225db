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
    """A layer of a model of ``shape`` with its ``weights``; called with the hidden states of one text."""

    shape: ModelShape
    weights: Mapping[str, Floats]

    def __call__(self, hidden: Floats, seen: Seen) -> Floats:
        """Hidden states [tokens, hidden] after the layer, of those before it."""
        hidden = hidden + self._attention(self._norm("input_layernorm", hidden), seen)
        return hidden + self._mlp(self._norm("post_attention_layernorm", hidden), seen)

    def _mlp(self, normed: Floats, seen: Seen) -> Floats:
        seen("fc", normed)
        rectified = np.maximum(normed @ self.weights[FC].T, np.float32(0))
        np.multiply(rectified, rectified, out=rectified)
        seen("proj", rectified)
        return np.asarray(rectified @ self.weights[PROJ].T)

    def _attention(self, normed: Floats, seen: Seen) -> Floats:
        shape, tokens = self.shape, len(normed)
        seen("qkv", normed)
        query, key, value = (normed @ self.weights[name].T for name in QKV)
        query, key = self._rotated(query), self._rotated(key)
        seen("keys", key)
        seen("values", value)
        group = shape.num_heads // shape.num_kv_heads
        by_kv_head = query.reshape(tokens, shape.num_kv_heads, group, shape.head_size)
        mixed = np.empty_like(by_kv_head)
        hidden_from = ~np.tri(tokens, dtype=bool)
        for head in range(shape.num_kv_heads):
            keys, values = (_head(kv, head, shape.head_size) for kv in (key, value))
            for member in range(group):
                scores = by_kv_head[:, head, member] @ keys.T
                scores *= np.float32(shape.head_size**-0.5)
                scores[hidden_from] = -np.inf
                scores -= scores.max(axis=1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=1, keepdims=True)
                mixed[:, head, member] = scores @ values
        joined = mixed.reshape(tokens, -1)
        seen("dense", joined)
        return np.asarray(joined @ self.weights[DENSE].T)

    def _norm(self, name: str, hidden: Floats) -> Floats:
        centred = hidden - hidden.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True) + np.float32(self.shape.norm_epsilon)
        scaled = centred / np.sqrt(variance) * self.weights[f"{name}.weight"]
        return np.asarray(scaled + self.weights[f"{name}.bias"])

    def _rotated(self, flat: Floats) -> Floats:
        """Turn the first elements of every head of ``flat`` [tokens, heads * head], in halves (GPT-NeoX order)."""
        size, half = self.shape.rotary_size, self.shape.rotary_size // 2
        heads = flat.reshape(len(flat), -1, self.shape.head_size)
        inverse = np.float32(1) / (self.shape.rotary_base ** (np.arange(half) / half)).astype(np.float32)
        angles = np.arange(len(flat), dtype=np.float32)[:, None, None] * inverse
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = heads[..., :half], heads[..., half:size]
        turned = [first * cos - second * sin, second * cos + first * sin, heads[..., size:]]
        return np.asarray(np.concatenate(turned, axis=2).reshape(flat.shape))


def _head(flat: Floats, head: int, size: int) -> Floats:
    return flat[:, head * size : (head + 1) * size]
