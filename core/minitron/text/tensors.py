"""Tensors as numpy arrays and as bytes of the KServe v2 protocol (``raw_input_contents``, little endian).

A BYTES element is its length in four bytes, then the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Arrays = Mapping[str, Array]

DATATYPES: Mapping[str, Any] = {
    "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32, "FP16": np.float16, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in DATATYPES.items()} | {np.dtype(object): "BYTES"}


#: Bytes that the tensors of one message may have: protobuf holds less than 2 GiB, and a response has others beside one.
MESSAGE_BYTES = (2 << 30) - (1 << 20)


def unpacked(tensors: Iterable[Any], contents: Iterable[bytes]) -> Tensors:
    """The arrays of a message's ``inputs`` or ``outputs`` with its raw contents; raises ValueError."""
    return {
        tensor.name: from_bytes(tensor.datatype, tuple(tensor.shape), raw)
        for tensor, raw in zip(tensors, contents, strict=True)
    }


def add_inputs(message: Any, arrays: Arrays) -> None:
    """Put arrays into a ``ModelInferRequest``, behind the inputs that it has."""
    for name, array in arrays.items():
        message.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        message.raw_input_contents.append(to_bytes(array))


def datatype(array: Array) -> str:
    """The protocol's name of an array's type; raises KeyError for one that it has not."""
    return _NAMES[array.dtype]


def to_bytes(array: Array) -> bytes:
    """An array (objects: bytes) in row-major order."""
    if array.dtype != object:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))


def from_bytes(kind: str, shape: tuple[int, ...], raw: bytes) -> Array:
    """An array of the protocol's type ``kind``; raises ValueError for bytes that are not one of that shape."""
    if kind in DATATYPES:
        return np.frombuffer(raw, DATATYPES[kind]).reshape(shape)
    items, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        items.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return np.array(items, dtype=object).reshape(shape)
