"""A stand-in for the package ``tensorrt_llm`` 1.2.1 in NVIDIA's image, as far as ``inside.py`` asks it.

The quantising operation follows the contract of the C++ one step by step (cutlass_preprocessors.cpp, sm80); it imports
nothing of the toolkit. IMAGE_DOUBLE makes it disagree: ``code`` (a code off by one), ``scale`` (a scale one bit
larger), ``config:KEY`` (a key dropped on reading), ``load`` (a checkpoint refused).
"""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import torch

__version__ = os.environ.get("TRTLLM_BUILD_DOUBLE_VERSION", "1.2.1")
HOW = os.environ.get("IMAGE_DOUBLE", "")
_ORDER_8 = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
_ORDER_4 = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
            4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31]  # fmt: skip


def symmetric_quantize_last_axis_of_batched_matrix(weight: Any, kind: Any) -> tuple[Any, Any]:
    """Codes in the layout of sm80, int8 [in, out] or [in, out / 2], and scales [out]; ``weight`` is [in, out]."""
    bits = 8 if kind == torch.int8 else 4
    given = _array(weight)
    values = given.astype(np.float32)
    steps = np.abs(values).max(axis=0) * np.float32(2.0 ** (1 - bits))
    quotient = np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
    rounded = np.trunc(quotient + np.copysign(np.float32(0.5), quotient))
    codes = np.clip(rounded, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
    if HOW == "code":
        codes[0, 0] += 1 if codes[0, 0] < 2 ** (bits - 1) - 1 else -1
    scales = steps.astype(given.dtype)
    if HOW == "scale":
        scales.view(np.uint16)[3] += 1
    return _tensor(_layout(codes, bits)), _tensor(scales)


def _layout(codes: Any, bits: int) -> Any:
    rows, columns = codes.shape
    order, columns_at_once = (_ORDER_8, 2) if bits == 8 else (_ORDER_4, 4)
    permuted = codes.reshape(rows // len(order), len(order), columns)[:, order].reshape(rows, columns)
    turned = permuted.T.reshape(columns // columns_at_once, columns_at_once, rows // 64, 64)
    flat = np.swapaxes(turned, 1, 2).reshape(-1)
    unsigned = (flat.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return unsigned.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(rows, columns).view(np.int8)
    mixed = unsigned.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    return (mixed[0::2] | mixed[1::2] << 4).astype(np.uint8).reshape(rows, columns // 2).view(np.int8)


def _array(tensor: Any) -> Any:
    if hasattr(torch, "from_numpy") and tensor.dtype == torch.bfloat16:  # torch itself, which numpy does not take
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> Any:
    if hasattr(torch, "from_numpy"):  # torch itself
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())
    return torch.Tensor(array)


class _Operations:
    """What stands under ``torch.ops.trtllm`` once this package is imported."""

    symmetric_quantize_last_axis_of_batched_matrix = staticmethod(symmetric_quantize_last_axis_of_batched_matrix)


torch.ops.trtllm = _Operations()
