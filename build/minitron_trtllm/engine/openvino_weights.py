"""A checkpoint's tensors as constants of the OpenVINO graph, none of them read before it is written.

Large constants stand in the graph as parameters of the right type and shape; ``openvino_ir`` writes their bytes, piece
by piece, and turns the parameters into constants. So the memory in use does not grow with the model. Weight-only
codes and scales stay what the checkpoint says; only the GPU's layout is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_trtllm.checkpoint import layout
from minitron_trtllm.checkpoint.read import Checkpoint
from minitron_trtllm.engine.openvino_import import opset13 as op
from minitron_trtllm.engine.openvino_import import ov
from minitron_trtllm.errors import CheckpointError

Pieces = Iterator[npt.NDArray[Any]]

_STORED = {"float16": "F16", "bfloat16": "BF16"}  # config.json's dtype -> safetensors
_ELEMENT = {"float16": "f16", "bfloat16": "bf16"}  # -> OpenVINO
_PIECE_BYTES = 8 << 20
_CHANNELS_AT_ONCE = 512
"""Output channels unpacked together: a multiple of the layout's tile whose working set stays in a core's cache."""


@dataclass(frozen=True)
class Constant:
    """A constant to be written: OpenVINO element type, shape, and what yields its bytes in order."""

    name: str
    element: str
    shape: tuple[int, int]
    pieces: Callable[[], Pieces]

    @property
    def nbytes(self) -> int:
        """Bytes in the weights file."""
        bits = {"i4": 4, "i8": 8, "f16": 16, "bf16": 16}[self.element]
        return self.shape[0] * self.shape[1] * bits // 8


class CheckpointWeights:
    """The graph's source of weights (``openvino_graph.Weights``) over an open checkpoint of one rank.

    ``constants`` lists what is to be written, in the order of the graph. Raises CheckpointError for a tensor that is
    missing or has another type or shape than config.json says.
    """

    def __init__(self, checkpoint: Checkpoint, *, lm_head_int8: bool = False) -> None:
        self._checkpoint, self._lm_head_int8 = checkpoint, lm_head_int8
        self.parameters: list[Any] = []
        self.constants: list[Constant] = []

    def embedding(self, rows: int, columns: int) -> Any:
        """The embedding, as stored."""
        return self._as_stored("transformer.vocab_embedding.weight", rows, columns)

    def head(self, rows: int, columns: int) -> Any:
        """The output projection, as stored or in int8 per row; the embedding where the checkpoint has none."""
        name = "lm_head.weight"
        if name not in self._checkpoint.names():
            name = "transformer.vocab_embedding.weight"
        return self._head_int8(name, rows, columns) if self._lm_head_int8 else self._as_stored(name, rows, columns)

    def linear(self, name: str, outs: int, ins: int) -> Any:
        """A linear weight: as stored, or its codes times its scales."""
        bits = self._checkpoint.precision.weight_bits
        if bits == 16:
            return self._as_stored(f"{name}.weight", outs, ins)
        scales = self._floats(f"{name}.per_channel_scale", (outs,))
        stored = f"{name}.weight"
        self._check(stored, "I8", (ins, outs * bits // 8))
        try:
            layout.check_sizes(outs, ins)
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.folder}: {name}: {error}") from error
        codes = Constant(name, f"i{bits}", (outs, ins), lambda: self._codes(stored, outs, ins, bits))
        return self._scaled(codes, scales)

    def vector(self, name: str, size: int) -> Any:
        """A norm's weight or bias in float32."""
        return op.constant(self._floats(name, (size,)))

    def _as_stored(self, name: str, rows: int, columns: int) -> Any:
        dtype = self._checkpoint.dtype
        self._check(name, _STORED[dtype], (rows, columns))
        return self._float32(Constant(name, _ELEMENT[dtype], (rows, columns), lambda: self._rows(name, rows)))

    def _scaled(self, codes: Constant, scales: npt.NDArray[np.float32]) -> Any:
        return op.multiply(self._float32(codes), op.constant(scales[:, None]))

    def _float32(self, constant: Constant) -> Any:
        parameter = op.parameter(ov.PartialShape(constant.shape), getattr(ov.Type, constant.element))
        parameter.set_friendly_name(constant.name)
        self.parameters.append(parameter)
        self.constants.append(constant)
        return op.convert(parameter, ov.Type.f32)

    def _rows(self, name: str, rows: int) -> Pieces:
        step = max(1, _PIECE_BYTES * rows // self._checkpoint.entry(name).nbytes)
        for start in range(0, rows, step):
            yield self._checkpoint.rows(name, start, min(start + step, rows))

    def _codes(self, name: str, outs: int, ins: int, bits: int) -> Pieces:
        """Codes as OpenVINO stores them, [out, in]; at 4 bits the even one of a pair in the low half of a byte.

        The layout keeps the channels in order, so that a run of them can be unpacked on its own.
        """
        flat = self._checkpoint.array(name).reshape(-1)
        for start in range(0, outs, _CHANNELS_AT_ONCE):
            stop = min(start + _CHANNELS_AT_ONCE, outs)
            run = flat[start * ins * bits // 8 : stop * ins * bits // 8].reshape(ins, -1)
            codes = layout.unpack(run, bits)
            yield codes if bits == 8 else codes[:, 0::2] & 15 | codes[:, 1::2] << 4

    def _head_int8(self, name: str, rows: int, columns: int) -> Any:
        """Symmetric int8 with one scale per row, made here: the checkpoint has 16 bits."""
        self._check(name, _STORED[self._checkpoint.dtype], (rows, columns))
        largest = [np.abs(piece.astype(np.float32)).max(axis=1) for piece in self._rows(name, rows)]
        scales = np.concatenate(largest) / np.float32(127)
        divisors = np.where(scales == 0, np.float32(1), scales)[:, None]

        def pieces() -> Pieces:
            start = 0
            for piece in self._rows(name, rows):
                stop = start + len(piece)
                yield np.rint(piece.astype(np.float32) / divisors[start:stop]).astype(np.int8)
                start = stop

        return self._scaled(Constant("lm_head", "i8", (rows, columns), pieces), scales)

    def _floats(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        self._check(name, _STORED[self._checkpoint.dtype], shape)
        return self._checkpoint.array(name).astype(np.float32)

    def _check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        entry = self._checkpoint.entry(name)
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CheckpointError(
                f"{self._checkpoint.folder}: {name} is {entry.dtype} {list(entry.shape)}, and its config.json makes it "
                f"{dtype} {list(shape)}; convert the model again"
            )
