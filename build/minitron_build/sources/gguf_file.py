"""Read a ``*.gguf`` file strictly, with pread: nothing is mapped, nothing is trusted.

Format (github ggml-org/ggml, docs/gguf.md, versions 2 and 3; little-endian): the magic "GGUF", u32 version, u64 number
of tensors, u64 number of keys; each key as a string, u32 type and value; each tensor as name, u32 number of sizes,
u64 sizes (fastest first), u32 type and u64 offset; then, from the next multiple of ``general.alignment``, the tensors
in the order of their offsets, each at a multiple of it. A string is a u64 length and UTF-8.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from minitron.errors import ModelError
from minitron_build.sources import gguf_types, kinds
from minitron_build.sources.gguf_types import TensorType

#: Keys and the list of tensors; a vocabulary of 256,000 pieces takes 6 MB. It keeps lying counts from filling memory.
MAX_HEADER_BYTES = 64 << 20
_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

#: A value of the metadata: a number, a string, or an array of either.
Value = bool | int | float | str | list[str] | npt.NDArray[Any]


@dataclass(frozen=True)
class GgufEntry:
    """One tensor: ``shape`` slowest axis first, as numpy has it; ``begin`` in bytes from the start of the file."""

    type: TensorType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufFile:
    """An open file: its ``metadata`` by key, its ``entries`` by name (in file order), and reading of rows.

    Reads use pread, so that several threads may share one object. Raises ModelError for whatever is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as cause:
            raise ModelError(f"{path} cannot be read: {cause.strerror}") from cause
        try:
            self.nbytes = os.fstat(self._file.fileno()).st_size
            header = _Header(path, self._file, self.nbytes)
            self.version = header.version
            self.metadata = header.metadata
            self.entries = header.entries()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading is over."""
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` (first axis) of a tensor: as stored where it holds floats, else dequantised."""
        entry = self.entries[name]
        if len(entry.shape) == 1:
            return entry.type.values(self._bytes(entry.begin, entry.nbytes), entry.shape)[start:stop]
        row_bytes = entry.nbytes // entry.shape[0]
        raw = self._bytes(entry.begin + start * row_bytes, (stop - start) * row_bytes)
        return entry.type.values(raw, (stop - start, *entry.shape[1:]))

    def _bytes(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        raw = np.empty(count, np.uint8)
        done = 0
        while done < count:
            got = os.preadv(self._file.fileno(), [raw.data[done:]], offset + done)
            if got == 0:
                raise ModelError(f"{self.path} became shorter while it was read; get the file again")
            done += got
        return raw


class _Header:
    """Reads what stands before the tensors, checking every length against what is left before it is believed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._position = path, file, size, 0
        self.version = self._version()
        self._tensors, keys = self._number("<u8"), self._number("<u8")
        self.metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string()
            if key in self.metadata:
                raise self._broken(f"has the key {key[:80]!r} twice")
            self.metadata[key] = self._value(self._number("<u4"), key)

    def _version(self) -> int:
        magic = self._take(4)
        if magic != kinds.GGUF:
            found = kinds.other(self._path)
            raise ModelError(f"{self._path} is {found or f'no GGUF file: it begins with {magic!r}'}")
        version: int = self._number("<u4")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise ModelError(f"{self._path} is a big-endian GGUF file, and only little-endian ones can be read")
            raise ModelError(
                f"{self._path} has GGUF version {version}, and 2 and 3 can be read; convert the model again"
            )
        return version

    def _value(self, kind: int, key: str) -> Value:
        if kind in _NUMBERS:
            value: Value = self._number(_NUMBERS[kind])
            return value
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._broken(f"has the key {key[:80]!r} of unknown type {kind}")
        items, count = self._number("<u4"), self._number("<u8")
        if items == _STRING:
            self._check_left(8 * count)
            return [self._string() for _ in range(count)]
        if items not in _NUMBERS:
            raise self._broken(f"has the key {key[:80]!r}, an array of type {items}, which cannot be read")
        dtype = np.dtype(_NUMBERS[items])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def entries(self) -> dict[str, GgufEntry]:
        """The tensors in file order, each checked to lie where the one before it ends, and within the file."""
        found: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
        for _ in range(self._tensors):
            name = self._string()
            if name in found:
                raise self._broken(f"has the tensor {name[:80]!r} twice")
            found[name] = (*self._described(name), self._number("<u8"))
        alignment = self._alignment()
        begin = position = _aligned(self._position, alignment)
        ordered: dict[str, GgufEntry] = {}
        for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            if begin + offset != position:
                what = "overlaps the one before it" if begin + offset < position else "leaves a gap before it"
                raise self._broken(f"is corrupt: tensor {name[:80]!r} {what}")
            ordered[name] = GgufEntry(kind, shape, position, kind.nbytes(shape))
            if position + ordered[name].nbytes > self._size:
                raise self._broken(f"is truncated: tensor {name[:80]!r} ends behind the file's {self._size:,} bytes")
            position = _aligned(position + ordered[name].nbytes, alignment)
        return ordered

    def _described(self, name: str) -> tuple[TensorType, tuple[int, ...]]:
        axes = self._number("<u4")
        if not 1 <= axes <= _MAX_AXES:
            raise self._broken(f"is corrupt: tensor {name[:80]!r} has {axes} axes")
        shape = tuple(self._number("<u8") for _ in range(axes))[::-1]
        number = self._number("<u4")
        kind = gguf_types.by_number(number)
        if kind is None:
            raise ModelError(
                f"{self._path} has the tensor {name[:80]!r} of type {number}, a type that is not known to the "
                "installed package gguf; update it, or get the file again"
            )
        if math.prod(shape) == 0 or math.prod(shape) // kind.block_elements * kind.block_bytes > self._size:
            raise self._broken(f"is corrupt: tensor {name[:80]!r} has shape {list(shape)}")
        if shape[-1] % kind.block_elements:
            raise self._broken(
                f"is corrupt: rows of {shape[-1]} in tensor {name[:80]!r} are not whole {kind.name} blocks of "
                f"{kind.block_elements}"
            )
        return kind, shape

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _ALIGNMENT)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not 0 < value <= _MAX_ALIGNMENT
            or value & value - 1
        ):
            raise self._broken(f"has general.alignment {value!r}, and a power of two is needed")
        return value

    def _string(self) -> str:
        try:
            return self._take(self._number("<u8")).decode()
        except UnicodeDecodeError:
            raise self._broken(f"has a string before byte {self._position:,} that is no UTF-8") from None

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0].item()

    def _take(self, count: int) -> bytes:
        self._check_left(count)
        self._position += count
        return self._file.read(count)

    def _check_left(self, count: int) -> None:
        if count > self._size - self._position:
            raise self._broken(f"is truncated: {count:,} bytes should follow byte {self._position:,} of {self._size:,}")
        if count > MAX_HEADER_BYTES - self._position:
            raise self._broken(f"has more than {MAX_HEADER_BYTES:,} bytes before its tensors, which no model needs")

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"{self._path} {what}; get the file again")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
