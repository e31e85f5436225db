"""A checkpoint's tensors as constants of the OpenVINO graph, none of them read before it is written.

Large constants stand in the graph as parameters of the right type and shape; ``openvino_ir`` writes their bytes, piece
by piece, and turns the parameters into constants. So the memory in use does not grow with the model. Weight-only
codes and scales stay what the checkpoint says; only the GPU's layout is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import ov
from minitron_build.checkpoint.codes import dequantize, quantize
from minitron_build.checkpoint.read import HEAD, Checkpoint
from minitron_build.engines.openvino.head import Screen, rounding_errors

Pieces = Iterator[npt.NDArray[Any]]

_ELEMENTS = {"float16": "f16", "bfloat16": "bf16"}
_EMBEDDING = "transformer.vocab_embedding.weight"
_PIECE_BYTES = 8 << 20
_CHANNELS_AT_ONCE = 512
"""Output channels unpacked together: a multiple of the layout's tile whose working set stays in a core's cache."""


@dataclass(frozen=True)
class Constant:
    """A constant to be written: OpenVINO element type, shape, and what yields its bytes in order."""

    name: str
    element: str
    shape: tuple[int, ...]
    pieces: Callable[[], Pieces]

    @property
    def nbytes(self) -> int:
        """Bytes in the weights file."""
        bits = {"i4": 4, "i8": 8, "f16": 16, "bf16": 16}[self.element]
        return math.prod(self.shape) * bits // 8


class CheckpointWeights:
    """The graph's source of weights (``openvino_graph.Weights``) over an open checkpoint of one rank.

    ``constants`` lists what is to be written, in the order of the graph. ``lm_head``: "as_is", "int8" (codes that the
    checkpoint does not hold) or "screened" (both).
    """

    def __init__(self, checkpoint: Checkpoint, *, lm_head: str = "as_is") -> None:
        self._checkpoint, self._lm_head = checkpoint, lm_head
        self.parameters: list[Any] = []
        self.constants: list[Constant] = []

    def embedding(self) -> Any:
        """The embedding, as stored."""
        return self._as_stored(_EMBEDDING)

    def head(self) -> Any:
        """The output projection; the embedding where the checkpoint has none (they are tied)."""
        return self._quantized_here(self._head_name, 8) if self._lm_head == "int8" else self._as_stored(self._head_name)

    def screen(self) -> Screen | None:
        """The output projection once more, in int8 by row, with scales in float32."""
        if self._lm_head != "screened":
            return None
        scales, errors = [], []
        for piece in self._rows(self._head_name):
            wide = piece.astype(np.float32)
            codes, steps = quantize(wide, 8)
            scales.append(steps)
            errors.append(rounding_errors(wide, dequantize(codes, steps)))

        def pieces() -> Pieces:
            return (quantize(piece.astype(np.float32), 8)[0] for piece in self._rows(self._head_name))

        shape = self._checkpoint.entry(self._head_name).shape
        codes_of_all = Constant(f"{self._head_name}/screen", "i8", (shape[0], shape[1]), pieces)
        return Screen(self._scaled(codes_of_all, np.concatenate(scales)), np.concatenate(errors))

    @property
    def _head_name(self) -> str:
        return HEAD if HEAD in self._checkpoint.names() else _EMBEDDING

    def linear(self, name: str) -> Any:
        """A linear weight: as stored, or codes times scales, made here where the checkpoint leaves that to us."""
        weight, bits = f"{name}.weight", self._checkpoint.precision.weight_bits
        if bits == 16:
            return self._as_stored(weight)
        if not self._checkpoint.quantized:
            return self._quantized_here(weight, bits)
        if self._checkpoint.spec.group_size:
            return self._grouped(name, self._checkpoint.spec.group_size)
        ins, stored = self._checkpoint.entry(weight).shape
        codes = Constant(weight, f"i{bits}", (stored * 8 // bits, ins), lambda: self._codes(weight, bits))
        return self._scaled(codes, self._checkpoint.array(f"{name}.per_channel_scale"))

    def factors(self, name: str) -> Any:
        """What the inputs of a linear module are multiplied with; None: nothing."""
        found = self._checkpoint.factors(name)
        return None if found is None else op.constant(found)

    def vector(self, name: str) -> Any:
        """A norm's weight or bias in float32."""
        return op.constant(self._checkpoint.array(name).astype(np.float32))

    def _grouped(self, name: str, group: int) -> Any:
        """Codes x the scales of their groups: the plugin's form, [out, groups, group], which it keeps compressed."""
        scales = self._checkpoint.array(f"{name}.weights_scaling_factor")
        outs, count = scales.shape
        weight = f"{name}.weight"
        codes = Constant(weight, "i4", (outs, count, group), lambda: self._codes(weight, 4))
        scaled = op.multiply(self._float32(codes), op.constant(scales[:, :, None]))
        return op.reshape(scaled, op.constant(np.array([outs, count * group], np.int64)), False)

    def _as_stored(self, name: str) -> Any:
        rows, columns = self._checkpoint.entry(name).shape
        element = _ELEMENTS[self._checkpoint.dtype]
        return self._float32(Constant(name, element, (rows, columns), lambda: self._rows(name)))

    def _quantized_here(self, name: str, bits: int) -> Any:
        """Codes and scales by TensorRT-LLM's rule, of a tensor that the checkpoint holds in 16 bits."""
        scales = np.concatenate([quantize(piece, bits)[1] for piece in self._rows(name)])
        rows, columns = self._checkpoint.entry(name).shape

        def pieces() -> Pieces:
            return (_packed(quantize(piece, bits)[0], bits) for piece in self._rows(name))

        return self._scaled(Constant(f"{name}/codes", f"i{bits}", (rows, columns), pieces), scales)

    def _scaled(self, codes: Constant, scales: npt.NDArray[Any]) -> Any:
        return op.multiply(self._float32(codes), op.constant(scales.astype(np.float32)[:, None]))

    def _float32(self, constant: Constant) -> Any:
        parameter = op.parameter(ov.PartialShape(constant.shape), getattr(ov.Type, constant.element))
        parameter.set_friendly_name(constant.name)
        self.parameters.append(parameter)
        self.constants.append(constant)
        return op.convert(parameter, ov.Type.f32)

    def _rows(self, name: str) -> Pieces:
        entry = self._checkpoint.entry(name)
        rows = entry.shape[0]
        step = max(1, _PIECE_BYTES * rows // entry.nbytes)
        return (self._checkpoint.rows(name, start, min(start + step, rows)) for start in range(0, rows, step))

    def _codes(self, name: str, bits: int) -> Pieces:
        shape = self._checkpoint.entry(name).shape
        outs = shape[0] * 2 if self._checkpoint.spec.group_size else shape[1] * 8 // bits
        for start in range(0, outs, _CHANNELS_AT_ONCE):
            yield _packed(self._checkpoint.codes(name, start, min(start + _CHANNELS_AT_ONCE, outs)), bits)


def _packed(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int8]:
    """Codes [out, in] as OpenVINO stores them: at 4 bits two to a byte, the first of a pair in the low half."""
    return codes if bits == 8 else codes[:, 0::2] & 15 | codes[:, 1::2] << 4
