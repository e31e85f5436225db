"""Tensors as bytes: Triton's raw contents, little endian; a string is its length in four bytes, then its UTF-8.

Source: KServe v2 protocol, ``raw_input_contents``, with Triton's BYTES encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

_FORMATS = {"INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f", "FP16": "e", "BOOL": "?"}


def pack(datatype: str, values: Sequence[Any]) -> bytes:
    """``values`` (strings for BYTES, numbers else) as raw contents of ``datatype``."""
    if datatype == "BYTES":
        encoded = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(one)) + one for one in encoded)
    return struct.pack(f"<{len(values)}{_FORMATS[datatype]}", *values)


def unpack(datatype: str, raw: bytes) -> list[Any]:
    """The flat values of raw contents; BYTES become str, invalid UTF-8 in them U+FFFD. Raises ValueError if cut off."""
    try:
        if datatype != "BYTES":
            code = _FORMATS[datatype]
            return list(struct.unpack(f"<{len(raw) // struct.calcsize('<' + code)}{code}", raw))
        values, at = [], 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            if at + 4 + size > len(raw):
                raise ValueError("a string is cut off")
            values.append(raw[at + 4 : at + 4 + size].decode(errors="replace"))
            at += 4 + size
        return values
    except (struct.error, KeyError) as error:
        raise ValueError(f"{len(raw)} bytes are no {datatype} tensor") from error
