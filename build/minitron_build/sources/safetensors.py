"""Read a ``*.safetensors`` file strictly, with pread: nothing is mapped, nothing is trusted.

Format (github huggingface/safetensors, README.md, "Format"): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, then the tensors, row-major
and little-endian, without gaps or overlaps, to the end of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from minitron.errors import InputError, ModelError
from minitron_build.sources import kinds

#: The library's own limit on the header, in bytes; it keeps a lying length from filling the memory.
MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 8

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

#: The element types a checkpoint or a model is made of, by their name in the format.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16, "I8": np.dtype(np.int8),
}  # fmt: skip
#: Bytes per element of everything the format knows, so that a type we do not use is named and not just "unknown".
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
               "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of the header: ``dtype`` as spelled there, ``begin`` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """An open file: its ``entries`` by name (in file order), and reading of whole tensors or of some of their rows.

    Reads use pread, so that several threads may share one object. Raises ``error`` (ModelError unless given) for
    whatever is wrong with the file.
    """

    def __init__(self, path: Path, error: type[InputError] = ModelError) -> None:
        self.path, self._error = path, error
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.nbytes = os.fstat(self._descriptor).st_size
            self.entries = _entries(self._header(), self._data_begin, self.nbytes, self._broken)
        except OSError as cause:
            self.close()
            raise error(f"{path} cannot be read: {cause.strerror}") from cause
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file descriptor back; reading is over."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` (default: the last) of a tensor as stored; its first axis is the row axis."""
        shape = self.entries[name].shape
        stop, width = shape[0] if stop is None else stop, math.prod(shape[1:])
        return self.elements(name, start * width, stop * width).reshape(-1, *shape[1:])

    def elements(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start`` to ``stop`` of a tensor, in the order of the file."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise self._error(f"{self.path}: {name} has dtype {entry.dtype}, and one of {', '.join(DTYPES)} is needed")
        array = np.empty(stop - start, DTYPES[entry.dtype])
        self._read_into(array.view(np.uint8).data, entry.begin + start * array.itemsize)
        return array

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as cause:
                raise self._error(f"{self.path} cannot be read: {cause.strerror}") from cause
            if count == 0:
                raise self._broken("became shorter while it was read")
            done += count

    def _header(self) -> Mapping[str, Any]:
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if found := kinds.instead_of_safetensors(self.path):
            raise self._error(f"{self.path} is {found}")
        if self.nbytes < 8 or length > self.nbytes - 8:
            raise self._broken(f"is truncated: its header should have {length:,} bytes, the file has {self.nbytes:,}")
        if length > MAX_HEADER_BYTES:
            raise self._broken(f"has a header of {length:,} bytes, more than the format's {MAX_HEADER_BYTES:,}")
        self._data_begin = 8 + length
        try:
            header = json.loads(os.pread(self._descriptor, length, 8), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as cause:
            raise self._broken(f"has a header that is no JSON ({cause})") from None
        if not isinstance(header, dict):
            raise self._broken("has a header that is no JSON object")
        return header

    def _broken(self, what: str) -> InputError:
        return self._error(f"{self.path} {what}; get the file again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entries(header: Mapping[str, Any], begin: int, end: int, broken: Any) -> dict[str, SafetensorsEntry]:
    """The header's tensors in file order, after checking that they fill ``begin`` to ``end`` exactly."""
    found = {name: _entry(name, raw, begin, broken) for name, raw in header.items() if name != "__metadata__"}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    position = begin
    for name, entry in ordered.items():
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise broken(f"is corrupt: tensor {name!r} {what}")
        position += entry.nbytes
    if position != end:
        what = "is truncated" if position > end else "has bytes after its last tensor"
        raise broken(f"{what}: its tensors end at byte {position:,} of {end:,}")
    return ordered


def _entry(name: str, raw: Any, begin: int, broken: Any) -> SafetensorsEntry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise broken(f"is corrupt: tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise broken(f"has tensor {name!r} of unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > _MAX_AXES:
        raise broken(f"is corrupt: tensor {name!r} has shape {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise broken(f"is corrupt: tensor {name!r} of {dtype} {shape} has data_offsets {str(offsets)[:80]}")
    return SafetensorsEntry(dtype, tuple(shape), begin + offsets[0], offsets[1] - offsets[0])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
    )
