"""Where a weight-only code lies in the file: TensorRT-LLM's mixed-GEMM layout for sm75 to sm89 (sm80 included).

The kernels want the codes permuted, interleaved and, at four bits, two to a byte. ``pack`` goes there step by step,
``unpack`` comes back.

Source: TensorRT-LLM 1.2.0rc2 ``cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp`` and, for the
numbers of each type, 0.15's ``cutlass_extensions/.../mixed_gemm_B_layout.h``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int8]

TILE_ROWS = 64
"""Input elements of one channel that stay together; sizes of a quantised matrix are multiples of it."""


@dataclass(frozen=True)
class Layout:
    """The numbers of one code width.

    ``rows``: order of the input rows inside each group of ``len(rows)``. ``columns``: output channels interleaved.
    ``elements``: order of neighbouring elements in the final sequence. ``offset``: what makes codes unsigned.
    """

    rows: tuple[int, ...]
    columns: int
    elements: tuple[int, ...]
    offset: int

    @functools.cached_property
    def order(self) -> npt.NDArray[Any]:
        """``rows`` and then ``elements``, in one: a group of elements of the latter lies inside one of the former."""
        return np.array(self.rows).reshape(-1, len(self.elements))[:, self.elements].reshape(-1)


LAYOUTS = {
    8: Layout(
        rows=(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
        columns=2,
        elements=(0, 2, 1, 3),
        offset=128,
    ),
    4: Layout(
        rows=(0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
              4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31),
        columns=4,
        elements=(0, 2, 4, 6, 1, 3, 5, 7),
        offset=8,
    ),
}  # fmt: skip


def pack(codes: Codes, bits: int) -> Codes:
    """Lay out codes [out, in] of -2^(bits-1) to 2^(bits-1)-1 as stored: int8 [in, out] or, for 4 bits, [in, out/2].

    Raises ValueError where a size is not a multiple of 64.
    """
    layout = LAYOUTS[bits]
    outs, ins = codes.shape
    check_sizes(outs, ins)
    unsigned = codes.view(np.uint8) + np.uint8(layout.offset)
    tiles = unsigned.reshape(outs // layout.columns, layout.columns, ins // TILE_ROWS, TILE_ROWS).swapaxes(1, 2)
    ordered = tiles.reshape(-1, len(layout.rows)).take(layout.order, axis=1).reshape(-1)
    stored = ordered if bits == 8 else ordered[0::2] | ordered[1::2] << 4
    return stored.view(np.int8).reshape(ins, outs * bits // 8)


def unpack(stored: Codes, bits: int) -> Codes:
    """The inverse of ``pack``: codes int8 [out, in] of ``stored`` int8 [in, out] or, for 4 bits, [in, out/2]."""
    layout = LAYOUTS[bits]
    ins, outs = stored.shape[0], stored.shape[1] * 8 // bits
    check_sizes(outs, ins)
    flat = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    ordered = flat if bits == 8 else np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)
    unsigned = ordered.reshape(-1, len(layout.elements))[:, _inverse(layout.elements)].reshape(-1)
    signed = (unsigned.astype(np.int16) - layout.offset).astype(np.int8)
    tiles = signed.reshape(outs // layout.columns, ins // TILE_ROWS, layout.columns, TILE_ROWS)
    by_output = tiles.swapaxes(1, 2).reshape(outs, ins)
    return np.ascontiguousarray(by_output.reshape(outs, -1, len(layout.rows))[:, :, _inverse(layout.rows)]).reshape(
        outs, ins
    )


def check_sizes(outs: int, ins: int) -> None:
    """Raise ValueError where the layout does not exist for a matrix of these sizes."""
    if outs % TILE_ROWS or ins % TILE_ROWS:
        raise ValueError(f"a matrix of {outs} x {ins} has no weight-only layout: both must be multiples of {TILE_ROWS}")


def _inverse(order: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.argsort(np.array(order))
