"""The element types of GGUF tensors: sizes and dequantising are the ``gguf`` package's, llama.cpp's own.

``gguf.quants.dequantize`` gives bit for bit what llama.cpp does; floats need no package but their own bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron import extras
from minitron.errors import MissingDependency
from minitron_build.sources.safetensors import BFLOAT16

_AT_ONCE_ELEMENTS = 1 << 18
"""How many are dequantised in one go: fewer cost Python more time than numpy, more do not fit a core's cache."""

_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}


@dataclass(frozen=True)
class TensorType:
    """A type by llama.cpp's ``number`` and ``name``: ``block_elements`` neighbours of a row take ``block_bytes``."""

    number: int
    name: str
    block_elements: int
    block_bytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """What ``values`` gives: the stored float type, or float32."""
        return _FLOATS.get(self.name, _FLOATS["F32"])

    @property
    def is_float(self) -> bool:
        """Whether elements are stored one by one as floats, nothing being quantised."""
        return self.name in _FLOATS

    @property
    def bits_per_weight(self) -> float:
        """Bits that an element takes, its share of the block's scales included."""
        return 8 * self.block_bytes / self.block_elements

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, its rows being whole blocks."""
        return math.prod(shape) // self.block_elements * self.block_bytes

    @functools.cached_property
    def can_be_read(self) -> bool:
        """Whether the elements are floats or can be turned into such."""
        try:
            self.values(np.zeros(self.block_bytes, np.uint8), (1, self.block_elements))
        except NotImplementedError:
            return False
        return True

    def values(self, raw: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The elements that ``raw`` stands for; raises NotImplementedError where ``can_be_read`` is false."""
        if self.is_float:
            return raw.view(self.dtype).reshape(shape)
        gguf = _package()
        kind, blocks = gguf.GGMLQuantizationType(self.number), raw.reshape(-1, self.block_bytes)
        values = np.empty((len(blocks), self.block_elements), np.float32)
        step = max(_AT_ONCE_ELEMENTS // self.block_elements, 1)
        with np.errstate(all="ignore"):  # NaN and infinity in broken scales are found by whoever uses the values
            for start in range(0, len(blocks), step):  # each as one row, which the package does not cut up
                piece = blocks[start : start + step].reshape(1, -1)
                values[start : start + step] = gguf.quants.dequantize(piece, kind).reshape(-1, self.block_elements)
        return values.reshape(shape)


@functools.cache
def by_number(number: int) -> TensorType | None:
    """The type of this number, None where the installed ``gguf`` knows none; raises MissingDependency."""
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return None
    return TensorType(number, kind.name, *gguf.GGML_QUANT_SIZES[kind])


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"GGUF files need the Python module {error.name}: {extras.advice(error.name or '')}"
        ) from None
    return gguf
