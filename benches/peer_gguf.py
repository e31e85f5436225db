"""The GGUF file of a Hugging Face folder, for llama.cpp's sides of ``bench_cpu``: the same weights as the other sides'.

Every matrix is in Q8_0 or Q4_0 (the embedding and the head too, which the engine keeps in 16 bits unless told
otherwise), norms are in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import gguf_files  # noqa: E402

#: The kind of GGUF that stands beside a precision.
KINDS = {"int8_weight_only": "Q8_0", "int4_weight_only": "Q4_0"}
_PIECE_ELEMENTS = 4 << 20


def gguf(model: Path, kind: str, work: Path) -> Path:
    """The GGUF file of a Hugging Face folder in ``work``, made once; a piece of a tensor in memory at a time."""
    path = work / f"{model.name}-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        sources = _sources(model)
        entries = [_entry(tensor, name, kind) for name, tensor in sources]
        data = (_pieces(tensor, name, kind) for name, tensor in sources)
        gguf_files.write_pieces(partial, gguf_files.metadata_of(model), entries, data)
        partial.rename(path)
    return path


def _sources(model: Path) -> list[tuple[str, Any]]:
    """All tensors by name, as slices that read what is asked for."""
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, "numpy") for path in sorted(model.glob("*.safetensors"))]
    return [(name, file.get_slice(name)) for file in files for name in file.keys()]  # noqa: SIM118 - not a dictionary


def _entry(tensor: Any, name: str, kind: str) -> gguf_files.Entry:
    import gguf as library

    shape = tuple(tensor.get_shape())
    number = library.GGMLQuantizationType[_kind(shape, kind)]
    elements_of_block, bytes_of_block = library.GGML_QUANT_SIZES[number]
    assert shape[-1] % elements_of_block == 0, f"{name}: rows of {shape[-1]} do not fit {kind}"
    size = int(np.prod(shape)) // elements_of_block * bytes_of_block
    return gguf_files.llama_cpp_name(name), shape, int(number), size


def _pieces(tensor: Any, name: str, kind: str) -> Iterator[bytes]:
    import gguf as library

    shape = tensor.get_shape()
    number = library.GGMLQuantizationType[_kind(shape, kind)]
    rows = shape[0] if len(shape) == 1 else max(1, _PIECE_ELEMENTS // shape[1])
    for start in range(0, shape[0], rows):
        values = tensor[start : min(start + rows, shape[0])].astype(np.float32)
        if name.endswith("norm.weight"):
            values = values + np.float32(1)
        yield library.quants.quantize(values, number).tobytes()


def _kind(shape: Any, kind: str) -> str:
    return "F32" if len(shape) == 1 else kind
