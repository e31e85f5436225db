"""Four-bit codes in groups: one scale for ``group`` neighbouring inputs of an output channel, as W4A16_AWQ has them.

Codes are -8 to 7 and stored two to a byte along the *output* axis, which no GPU reads as it is: TensorRT-LLM lays them
out when an engine is built (``preprocess_weights`` in 1.x ``models/modeling_utils.py``), so a file fits every GPU.
The rule for codes and scales is that of ModelOpt 0.47.0's export (``export/quant_utils.py``): bit for bit the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

SMALLEST, LARGEST = -8, 7
"""Codes: a scale is the largest magnitude / 7, so that only a group that is clipped can reach -8."""


def scales_of(weights: Floats, group: int) -> Floats:
    """One scale [out, in / group] for each group of ``weights`` [out, in]: its largest magnitude / 7."""
    outs, ins = weights.shape
    return np.asarray(np.abs(weights).reshape(outs, ins // group, group).max(axis=2) / np.float32(LARGEST))


def quantize(weights: Floats, scales: Floats) -> Codes:
    """Codes [out, in] of ``weights`` [out, in] by ``scales`` [out, groups]: to nearest, ties to even, -8 to 7.

    0 where a scale is 0. What lies beyond is cut off there, which is how a group is clipped.
    """
    divisors = np.where(scales > 0, scales, np.float32(1))
    codes = grouped(weights, scales) / divisors[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, SMALLEST, LARGEST, out=codes)
    return np.asarray(codes, np.int8).reshape(weights.shape)


def dequantize(codes: Codes, scales: Floats) -> Floats:
    """The float32 weights [out, in] that codes and scales stand for."""
    return np.asarray(grouped(codes, scales) * scales[:, :, None], np.float32).reshape(codes.shape)


def grouped(matrix: npt.NDArray[Any], scales: Floats) -> npt.NDArray[Any]:
    """``matrix`` [out, in] as [out, groups, in / groups], with as many groups as ``scales`` has."""
    return matrix.reshape(*scales.shape, matrix.shape[1] // scales.shape[1])


def pack(codes: Codes) -> Codes:
    """Codes [out, in] as stored, int8 [out / 2, in]: the even output channel of a pair in the low four bits."""
    return codes[0::2] & np.int8(15) | codes[1::2] << np.int8(4)


def unpack(stored: Codes) -> Codes:
    """The inverse of ``pack``: codes int8 [out, in] of ``stored`` int8 [out / 2, in]."""
    pairs = np.stack([stored << np.int8(4), stored], axis=1) >> np.int8(4)  # shifting down again keeps the sign
    return np.asarray(pairs, np.int8).reshape(2 * stored.shape[0], stored.shape[1])
