"""The NemotronForCausalLM graph as an ``openvino.Model``, built node by node from a TensorRT-LLM checkpoint's weights.

It is the stateful form that ``openvino_genai`` turns into paged attention: ``input_ids``, ``attention_mask`` and
``position_ids`` (int64 [batch, tokens]) and ``beam_idx`` (int32 [batch]) in, ``logits`` (float32
[batch, tokens, vocab]) out, keys and values of past tokens in variables. Everything is computed in float32 here; the
plugin chooses less where it is told to (fast execution).

Sources: the weights' meaning is TensorRT-LLM's GPT model, variant nemotron (``models/gpt/model.py``); names and shapes
of parameters and variables are those that ``openvino_genai`` 2026.4 looks for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minitron.machine.openvino import opset6, ov
from minitron.machine.openvino import opset13 as op
from minitron.model.shape import ModelShape
from minitron_build.engines.openvino.head import Screen, screened
from minitron_build.engines.openvino.nodes import ints, parameter

Node = Any  # an openvino.Node; the package has no usable types
_MASKED = np.float32(-65504)


class Weights(Protocol):
    """Where the graph gets its weights: each call yields a float32 node."""

    parameters: list[Node]
    """Parameters of the model that stand for large constants until those are written."""

    def embedding(self) -> Node:
        """The vocabulary embedding, [vocab, hidden]."""

    def head(self) -> Node:
        """The output projection, [vocab, hidden]."""

    def screen(self) -> Screen | None:
        """A cheap copy of the output projection to look through first; None: there is none."""

    def linear(self, name: str) -> Node:
        """A layer's linear weight, [out, in]; what is stored may be codes and scales."""

    def factors(self, name: str) -> Node | None:
        """What the inputs of that linear module are multiplied with, [in]; None: nothing."""

    def vector(self, name: str) -> Node:
        """A norm's weight or bias, [hidden]."""


#: Least magnitude that rounding to float16 turns into infinity.
_FLOAT16_OVERFLOW = np.float32(65520)


def measured_node(layer: int, kind: str) -> str:
    """Name of the node whose magnitudes ``minitron eval`` looks at: fc (after its ReLU), proj, attended, residual.

    ``attended`` and ``residual`` are the sums that a layer's attention and its MLP are added to.
    """
    return f"layers.{layer}.{kind}"


def build_graph(shape: ModelShape, weights: Weights, *, overflow: str = "none", proven: bool = True) -> Any:
    """Return the ``openvino.Model`` of a Nemotron model of this shape.

    Where the weights have a screen, the input ``sampled_tokens_indices`` (int64 [rows]) says which tokens get logits,
    [rows, 1, vocab]; ``proven`` is the screen's (``head``).

    ``overflow``: "float16" makes infinite what float16 does not hold, where TensorRT-LLM's float16 network would have
    stored it (mlp.fc, its square, mlp.proj, the residual); nothing else is rounded.
    """
    ids, mask, positions = (parameter(name, 2) for name in ("input_ids", "attention_mask", "position_ids"))
    beams = parameter("beam_idx", 1, ov.Type.i32)
    cos, sin = (_at(table, positions) for table in rotary_tables(shape))
    batch = op.gather(op.shape_of(ids), ints([0]), ints(0))
    layers = _Layers(shape, weights, cos, sin, _mask(ids, mask), beams, batch, overflow == "float16")
    hidden = op.gather(weights.embedding(), ids, ints(0))
    for index in range(shape.num_layers):
        hidden = layers.held(op.add(hidden, layers.attention(index, hidden)), measured_node(index, "attended"))
        hidden = layers.held(op.add(hidden, layers.mlp(index, hidden)), measured_node(index, "residual"))
    hidden = layers.norm("transformer.ln_f", hidden)
    matrix, screen, inputs = weights.head(), weights.screen(), [ids, mask, positions, beams]
    if screen is None:
        logits = op.matmul(hidden, matrix, False, True)
    else:
        logits, rows = screened(hidden, matrix, screen, proven=proven)
        inputs.append(rows)
    logits.output(0).set_names({"logits"})
    parameters = [*inputs, *weights.parameters]
    return ov.Model([op.result(logits)], layers.sinks, parameters, "minitron")


def rotary_tables(shape: ModelShape) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, float32 [positions, rotary], the halves of each row alike.

    Source: TensorRT-LLM ``layers/attention.py``: the inverse frequencies are rounded to float32 before they are used.
    """
    exponents = np.arange(0, shape.rotary_size, 2, dtype=np.float64) / shape.rotary_size
    inverse = np.float32(1) / (shape.rotary_base**exponents).astype(np.float32)
    angles = np.arange(shape.max_positions, dtype=np.float32)[:, None] * inverse
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles), np.sin(angles)


@dataclass(frozen=True)
class _Layers:
    """The decoder layers and what they share.

    ``cos`` and ``sin`` are [batch, 1, tokens, rotary], ``mask`` [batch, 1, tokens, past + tokens], ``batch`` [1];
    ``sinks`` collects the nodes that store keys and values. Hidden states are [batch, tokens, hidden].
    """

    shape: ModelShape
    weights: Weights
    cos: Node
    sin: Node
    mask: Node
    beam_idx: Node
    batch: Node
    as_float16: bool = False
    sinks: list[Node] = field(default_factory=list)

    def attention(self, index: int, hidden: Node) -> Node:
        shape, layer = self.shape, f"transformer.layers.{index}"
        size, kv_size = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        qkv = self._linear(f"{layer}.attention.qkv", self.norm(f"{layer}.input_layernorm", hidden))
        parts = op.variadic_split(qkv, ints(2), ints([size, kv_size, kv_size]))
        query = self._rotate(self._heads(parts.output(0), shape.num_heads))
        key = self._rotate(self._heads(parts.output(1), shape.num_kv_heads))
        value = self._heads(parts.output(2), shape.num_kv_heads)
        past = f"past_key_values.{index}"
        keys = self._share(self._remember(f"{past}.keypresent.{index}.key", key))
        values = self._share(self._remember(f"{past}.valuepresent.{index}.value", value))
        mixed = op.scaled_dot_product_attention(query, keys, values, self.mask)
        joined = op.reshape(op.transpose(mixed, ints([0, 2, 1, 3])), ints([0, 0, size]), True)
        return self._linear(f"{layer}.attention.dense", joined)

    def mlp(self, index: int, hidden: Node) -> Node:
        layer = f"transformer.layers.{index}"
        rectified = op.relu(self._linear(f"{layer}.mlp.fc", self.norm(f"{layer}.post_layernorm", hidden)))
        rectified = self.held(rectified, measured_node(index, "fc"))
        squared = self.held(op.multiply(rectified, rectified), f"layers.{index}.squared")
        return self.held(self._linear(f"{layer}.mlp.proj", squared), measured_node(index, "proj"))

    def _linear(self, name: str, inputs: Node) -> Node:
        """The product of inputs [batch, tokens, in] with a layer's linear weight."""
        factors = self.weights.factors(name)
        scaled = inputs if factors is None else op.multiply(inputs, factors)
        return op.matmul(scaled, self.weights.linear(name), False, True)

    def held(self, node: Node, name: str) -> Node:
        """The node under that name; with ``as_float16``, infinite where float16 would be."""
        if self.as_float16:
            holds = op.less(op.abs(node), op.constant(_FLOAT16_OVERFLOW))
            node = op.select(holds, node, op.multiply(node, op.constant(np.float32(np.inf))))
        node.set_friendly_name(name)
        return node

    def norm(self, name: str, hidden: Node) -> Node:
        """LayerNorm; the checkpoint's weight already has Nemotron's + 1."""
        weight, bias = self.weights.vector(f"{name}.weight"), self.weights.vector(f"{name}.bias")
        normed = op.mvn(hidden, ints([-1]), True, self.shape.norm_epsilon, "inside_sqrt")
        return op.add(op.multiply(normed, weight), bias)

    def _heads(self, flat: Node, count: int) -> Node:
        """[batch, tokens, count * head] -> [batch, count, tokens, head]."""
        split = op.reshape(flat, ints([0, 0, count, self.shape.head_size]), True)
        return op.transpose(split, ints([0, 2, 1, 3]))

    def _rotate(self, heads: Node) -> Node:
        """Rotary embedding of the first elements of each head, in halves (GPT-NeoX order)."""
        size, half, head = self.shape.rotary_size, self.shape.rotary_size // 2, self.shape.head_size
        start = _slice(heads, 0, size)
        turned = op.concat([op.negative(_slice(start, half, size)), _slice(start, 0, half)], -1)
        rotated = op.add(op.multiply(start, self.cos), op.multiply(turned, self.sin))
        return rotated if size == head else op.concat([rotated, _slice(heads, size, head)], -1)

    def _remember(self, variable: str, new: Node) -> Node:
        """Append ``new`` to what the variable holds of past tokens; [batch, kv heads, past + tokens, head]."""
        kv_heads, head = self.shape.num_kv_heads, self.shape.head_size
        empty = op.concat([self.batch, ints([kv_heads]), ints([0]), ints([head])], 0)
        nothing = op.broadcast(op.constant(np.float32(0)), empty)
        past = opset6.read_value(nothing, variable, ov.Type.f32, ov.PartialShape([-1, kv_heads, -1, head]))
        history = op.concat([op.gather(past, self.beam_idx, ints(0)), new], 2)
        self.sinks.append(opset6.assign(history, variable))
        return history

    def _share(self, kv: Node) -> Node:
        """Repeat each key/value head for the query heads that share it."""
        heads, group = self.shape.num_heads, self.shape.num_heads // self.shape.num_kv_heads
        if group == 1:
            return kv
        repeated = op.broadcast(op.unsqueeze(kv, ints(2)), ints([1, 1, group, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(repeated, ints([0, heads, -1, self.shape.head_size]), True)


def _slice(node: Node, start: int, stop: int) -> Node:
    """Elements ``start`` to ``stop`` of the last axis."""
    return op.slice(node, ints([start]), ints([stop]), ints([1]), ints([-1]))


def _mask(ids: Node, attention_mask: Node) -> Node:
    """0 where a token may look, a very negative number elsewhere; [batch, 1, tokens, past + tokens]."""
    total, new = _length(attention_mask), _length(ids)
    keys = op.range(ints(0), total, ints(1), output_type="i64")
    queries = op.unsqueeze(op.range(op.subtract(total, new), total, ints(1), output_type="i64"), ints(1))
    real = op.unsqueeze(op.not_equal(attention_mask, ints(0)), ints([1, 2]))
    allowed = op.logical_and(op.less_equal(keys, queries), real)
    return op.select(allowed, op.constant(np.float32(0)), op.constant(_MASKED))


def _length(node: Node) -> Node:
    """The size of the second axis, a scalar."""
    return op.gather(op.shape_of(node), ints(1), ints(0))


def _at(table: npt.NDArray[np.float32], positions: Node) -> Node:
    """Rows of a rotary table for each position, with an axis for the heads: [batch, 1, tokens, rotary]."""
    return op.unsqueeze(op.gather(op.constant(table), positions, ints(0)), ints(1))
