"""A stand-in for torch as far as ``inside.py`` uses it: tensors over numpy arrays, and the namespace of operations.

The tests marked ``reference`` run ``inside.py`` with torch itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

float16, bfloat16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
int8, uint8 = np.dtype(np.int8), np.dtype(np.uint8)
quint4x2 = "quint4x2"
version = SimpleNamespace(cuda="13.1")
ops = SimpleNamespace()


class Tensor:
    """Some of torch.Tensor's methods over a numpy array."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def reshape(self, *shape: int) -> Tensor:
        return Tensor(self.array.reshape(shape))

    def t(self) -> Tensor:
        return Tensor(self.array.T)

    def contiguous(self) -> Tensor:
        return Tensor(np.ascontiguousarray(self.array))

    def cpu(self) -> Tensor:
        return self

    def view(self, dtype: Any) -> Tensor:
        return Tensor(self.array.view(dtype))

    def numpy(self) -> Any:
        return self.array


def frombuffer(raw: bytearray, dtype: Any) -> Tensor:
    """As torch's: the buffer itself."""
    return Tensor(np.frombuffer(raw, dtype))
