"""Weight-only codes and scales, as TensorRT-LLM's CPU quantiser makes them.

Source: TensorRT-LLM 1.2.0rc2 ``cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp``
(symmetric_quantize).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def quantize(weights: npt.NDArray[Any], bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Codes int8 [out, in] and scales [out] (in the weights' dtype) of ``weights`` [out, in].

    Weights are float16 or bfloat16, or such values in float32: then the scales are still to be rounded. A code is
    round-half-away-from-zero(weight / s), clamped to -2^(bits-1) .. 2^(bits-1)-1, where s is the channel's largest
    magnitude x 2^-(bits-1) in float32. The scale stored is s rounded to the dtype; the unrounded s divides.
    """
    top = 2 ** (bits - 1)
    wide = weights.astype(np.float32)
    steps = np.abs(wide).max(axis=1) * np.float32(1 / top)
    wide /= np.where(steps > 0, steps, np.float32(1))[:, None]
    wide += np.copysign(np.float32(0.5), wide)  # exact here: weights have at most 11 bits
    np.minimum(wide, np.float32(top - 1), out=wide)
    return wide.astype(np.int8), steps.astype(weights.dtype)  # becoming int8 drops the fraction


def dequantize(codes: npt.NDArray[np.int8], scales: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32 weights [out, in] that codes and scales stand for."""
    return codes.astype(np.float32) * scales.astype(np.float32)[:, None]
