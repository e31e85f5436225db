"""The values of a planned tensor, some rows at a time.

Every weight is rounded to the checkpoint's dtype first (to nearest even), then everything else happens in that dtype
(TensorRT-LLM 1.x ``models/gpt/convert.py``). Rotary tables: ``layers/attention.py`` and 0.15's ``functional.py``
(RopeEmbeddingUtils).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minitron.errors import ModelError
from minitron.model.precision import Precision
from minitron_build.checkpoint import codes, groups, layout
from minitron_build.checkpoint.plan import Part, PlannedTensor, Rule
from minitron_build.checkpoint.rounding import rounded
from minitron_build.checkpoint.spec import Spec
from minitron_build.sources.model import SourceTensor
from minitron_build.sources.safetensors import BFLOAT16

Array = npt.NDArray[Any]

#: numpy's types of a checkpoint's dtypes.
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}

_PIECE_ELEMENTS = 1 << 18
#: ``embed_positions`` is computed with this base whatever the model's own is.
_POSITIONS_BASE = 10000.0
_MAGNITUDE_BITS = {2: 0x7FFF, 4: 0x7FFFFFFF}
#: Bit patterns of infinity, and of the least magnitude that rounding to a narrower type turns into infinity.
_INFINITY = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80, np.dtype(np.float32): 0x7F800000}
_OVERFLOW = {
    (np.dtype(np.float32), np.dtype(np.float16)): 0x477FF000,
    (BFLOAT16, np.dtype(np.float16)): 0x4780,
    (np.dtype(np.float32), BFLOAT16): 0x7F7F8000,
}


@dataclass(frozen=True)
class Values:
    """Rows of a planned tensor as they lie in the file; ``scales`` beside codes only."""

    data: Array
    scales: Array | None = None


class Calibrated(Protocol):
    """What a calibration found, by the names of the source's matrices."""

    def factors(self, tensor: str) -> npt.NDArray[np.float32]:
        """What the inputs of ``tensor`` are multiplied with, [in]."""

    def codes(self, tensor: str) -> npt.NDArray[np.int8]:
        """Its codes, packed as ``groups.pack`` does: [out / 2, in]."""

    def scales(self, tensor: str) -> npt.NDArray[np.float32]:
        """Their scales, [out, in / group]."""

    def kv_scale(self, index: int) -> np.float32:
        """What a unit of an INT8 key or value of a layer stands for."""


class Calculator:
    """Computes values for one ``spec`` from the source's ``tensors``; may be used by several threads.

    ``dtype`` takes the place of the spec's where weights are wanted unrounded. ``calibrated`` is needed for int4_awq
    and for an INT8 KV cache.
    """

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, SourceTensor],
        dtype: np.dtype[Any] | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        self._spec, self._tensors, self._calibrated = spec, tensors, calibrated
        self._dtype = dtype or DTYPES[spec.dtype]

    def values(self, planned: PlannedTensor, start: int, stop: int) -> Values:
        """Rows ``start`` to ``stop`` of ``planned``; raises ModelError for weights that are not finite."""
        if planned.rule is Rule.CODES:
            return self._codes(planned, start, stop)
        if planned.rule is Rule.GROUP_CODES:
            return self._group_codes(planned, start, stop)
        if planned.rule in (Rule.FACTORS, Rule.KV_SCALE):
            return Values(self._of_calibration(planned)[start:stop])
        if planned.rule in (Rule.CAST, Rule.NORM):
            rows = np.concatenate([self.rows(planned, *piece) for piece in self._pieces(planned, start, stop)])
            return Values(rows + self._dtype.type(1) if planned.rule is Rule.NORM else rows)
        return Values(_TABLES[planned.rule](self._spec, np.arange(start, stop)))

    def _codes(self, planned: PlannedTensor, start: int, stop: int) -> Values:
        bits = self._spec.precision.weight_bits
        done = [
            codes.quantize(self.rows(planned, *piece, wide=True), bits) for piece in self._pieces(planned, start, stop)
        ]
        quantized, steps = (np.concatenate(found) for found in zip(*done, strict=True))
        return Values(layout.pack(quantized, bits), steps.astype(self._dtype))

    def _group_codes(self, planned: PlannedTensor, start: int, stop: int) -> Values:
        group = self._spec.group_size
        assert group is not None
        if self._spec.precision is Precision.INT4_AWQ:
            found = [
                self._calibrated_codes(part, first, last, group) for part, first, last in _cut(planned, start, stop)
            ]
        else:
            wide = (self.rows(planned, *piece, wide=True) for piece in self._pieces(planned, start, stop))
            found = []
            for rows in wide:
                scales = groups.scales_of(rows, group)
                found.append((groups.pack(groups.quantize(rows, scales)), scales))
        data, scaled = (np.concatenate(each) for each in zip(*found, strict=True))
        return Values(data, scaled)

    def _calibrated_codes(self, part: Part, first: int, last: int, group: int) -> tuple[Array, Array]:
        """Rows ``first`` to ``last`` of the part's matrix, of those the part's columns."""
        stored, scales = self._found.codes(part.tensor), self._found.scales(part.tensor)
        right = stored.shape[1] if part.right is None else part.right
        return (
            stored[first // 2 : last // 2, part.left : right],
            scales[first:last, part.left // group : right // group],
        )

    def _of_calibration(self, planned: PlannedTensor) -> Array:
        part = planned.parts[0]
        if planned.rule is Rule.KV_SCALE:
            return np.array([self._found.kv_scale(int(part.tensor.split(".")[2]))], np.float32)
        return self._found.factors(part.tensor)[part.left : part.right].astype(self._dtype)

    @property
    def _found(self) -> Calibrated:
        assert self._calibrated is not None, "the plan asks for what a calibration finds"
        return self._calibrated

    def _pieces(self, planned: PlannedTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The rows a few at a time, so that each step finds what the one before it left in the cache of a core."""
        width = math.prod(self._tensors[planned.parts[0].tensor].shape[1:])
        step = max(_PIECE_ELEMENTS // width, 1)
        return ((first, min(first + step, stop)) for first in range(start, stop, step))

    def rows(self, planned: PlannedTensor, start: int, stop: int, *, wide: bool = False) -> Array:
        """Rows ``start`` to ``stop`` of the matrix that ``planned``'s parts make, rounded to the dtype.

        ``wide``: rounded just so, but in float32.
        """
        pieces = [self._cast(part, first, last, wide=wide) for part, first, last in _cut(planned, start, stop)]
        offset = sum(part.stop - part.start for part in planned.parts)
        if stop > offset:
            like = self._tensors[planned.parts[0].tensor].shape[1:]
            pieces.append(np.zeros((stop - max(start, offset), *like), np.float32 if wide else self._dtype))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _cast(self, part: Part, start: int, stop: int, *, wide: bool) -> Array:
        tensor = self._tensors[part.tensor]
        stored = tensor.read(start, stop)
        if part.right is not None:
            stored = np.ascontiguousarray(stored[:, part.left : part.right])
        self._refuse_what_is_not_finite(tensor, stored)
        return rounded(stored, self._dtype) if wide else stored.astype(self._dtype, copy=False)

    def _refuse_what_is_not_finite(self, tensor: SourceTensor, stored: Array) -> None:
        largest = int(magnitudes(stored).max(initial=0))
        if largest >= _INFINITY[stored.dtype]:
            self._refuse(tensor, _INFINITY[stored.dtype], "NaN or infinite", "the model is damaged")
        overflow = _OVERFLOW.get((stored.dtype, self._dtype))
        if overflow is not None and largest >= overflow:
            advice = "take bfloat16" if self._dtype != BFLOAT16 else "they are no sensible weights"
            self._refuse(tensor, overflow, f"too large for {self._spec.dtype}", advice)

    def _refuse(self, tensor: SourceTensor, limit: int, what: str, advice: str) -> None:
        """Count over the whole tensor, so that the message does not depend on where the rows were cut."""
        step = max(1, (1 << 22) // max(1, int(np.prod(tensor.shape[1:]))))
        count = sum(
            int(np.count_nonzero(magnitudes(tensor.read(row, min(row + step, tensor.shape[0]))) >= limit))
            for row in range(0, tensor.shape[0], step)
        )
        raise ModelError(f"{tensor.file}: {tensor.name} has {count:,} values that are {what}; {advice}")


def _cut(planned: PlannedTensor, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
    """The parts that rows ``start`` to ``stop`` lie in, each with its own rows' first and last."""
    offset = 0
    for part in planned.parts:
        first, last = max(start - offset, 0), min(stop - offset, part.stop - part.start)
        if first < last:
            yield part, part.start + first, part.start + last
        offset += part.stop - part.start


def magnitudes(values: Array) -> Array:
    """Bit patterns without the sign: whole numbers in the order of the magnitudes, infinity and NaN on top."""
    unsigned: Array = values.view(f"u{values.itemsize}")
    return np.bitwise_and(unsigned, unsigned.dtype.type(_MAGNITUDE_BITS[values.itemsize]))


def _inverse_frequencies(spec: Spec, base: float) -> npt.NDArray[np.float32]:
    size = spec.shape.rotary_size
    return (1.0 / (base ** (np.arange(0, size, 2) / size)).astype(np.float32)).astype(np.float32)


def _angles(spec: Spec, base: float, positions: Array) -> npt.NDArray[np.float32]:
    return positions.astype(np.float32)[:, None] * _inverse_frequencies(spec, base)


def _positions(spec: Spec, positions: Array) -> Array:
    angles = _angles(spec, _POSITIONS_BASE, positions)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _positions_for_attention(spec: Spec, positions: Array) -> Array:
    angles = _angles(spec, spec.shape.rotary_base, positions)
    return np.stack([np.cos(angles), np.sin(angles)], axis=2)


def _rotary_inv_freq(spec: Spec, elements: Array) -> Array:
    return _inverse_frequencies(spec, spec.shape.rotary_base)[elements]


_TABLES: dict[Rule, Callable[[Spec, Array], Array]] = {
    Rule.POSITIONS: _positions,
    Rule.POSITIONS_FOR_ATTENTION: _positions_for_attention,
    Rule.INVERSE_FREQUENCIES: _rotary_inv_freq,
}
