"""Every element type that the gguf package knows: read as it dequantises, or refused. The judge is that package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import gguf_files
from conftest import DATA, SMALL_MODEL, minitron
from minitron.errors import ModelError
from minitron_build.sources import gguf_types
from minitron_build.sources.gguf import GgufModel
from minitron_build.sources.gguf_file import GgufFile

Kind: Any = gguf.GGMLQuantizationType
SHAPE = (96, 4096)  # more than is dequantised in one go


def can_be_read(kind: Any) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


READABLE = [kind for kind in Kind if can_be_read(kind)]
OTHERS = [kind for kind in Kind if not can_be_read(kind)]


def random_blocks(kind: Any) -> npt.NDArray[np.uint8]:
    """Bytes of SHAPE in a type. Any bits are a block; some have scales that are infinite or NaN."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    count: int = math.prod(SHAPE) // elements * size
    return np.random.default_rng(int(kind)).integers(0, 256, count, dtype=np.uint8)


def test_the_types_in_use_are_among_them() -> None:
    names = {kind.name for kind in READABLE}
    assert {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q4_K",
        "Q3_K",
        "Q2_K",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
    } <= names
    assert {f"IQ{size}" for size in ["4_XS", "4_NL", "3_S", "3_XXS", "2_S", "2_XS", "2_XXS", "1_S", "1_M"]} <= names


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: str(kind.name))
def test_rows_equal_the_packages(kind: Any, tmp_path: Path) -> None:
    raw = random_blocks(kind)
    gguf_files.write(tmp_path / "one.gguf", {}, [("weight", SHAPE, int(kind), raw.tobytes())])
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw.reshape(SHAPE[0], -1), kind)
    with GgufFile(tmp_path / "one.gguf") as file:
        found = np.concatenate([file.rows("weight", *part) for part in ((0, 7), (7, 90), (90, 96))])
    assert math.prod(SHAPE) > gguf_types._AT_ONCE_ELEMENTS
    if kind in (Kind.F16, Kind.BF16):  # as stored
        assert found.tobytes() == raw.tobytes()
    else:
        assert np.array_equal(found.view(np.uint32), wanted.reshape(SHAPE).view(np.uint32))


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: str(kind.name))
def test_others_are_refused_by_name(kind: Any, tmp_path: Path) -> None:
    metadata, tensors = gguf_files.metadata_of(SMALL_MODEL), gguf_files.tensors_of(SMALL_MODEL, "BF16")
    at = next(index for index, tensor in enumerate(tensors) if tensor[0] == "blk.1.ffn_up.weight")
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    data = bytes(math.prod(tensors[at][1]) // elements * size)
    tensors[at] = (*tensors[at][:2], int(kind), data)
    gguf_files.write(tmp_path / "other.gguf", metadata, tensors)
    with GgufModel(tmp_path / "other.gguf") as model, pytest.raises(ModelError, match=rf"blk\.1\.ffn_up.*{kind.name}"):
        model.tensors()


def test_the_summary_counts_types_and_says_what_was_lost(tmp_path: Path) -> None:
    path = DATA / "gguf" / "tiny-Q4_K_M.gguf"
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
    found = json.loads(minitron("convert", path, "--output", tmp_path / "c", "--json").stdout)
    assert found["source_types"] == {kind: kinds.count(kind) for kind in set(kinds)}
    assert any("Q4_K, Q6_K" in sentence for sentence in found["lost_before"])
    shown = minitron("convert", path, "--output", tmp_path / "c", "--force").stdout
    assert f"Q4_K x {kinds.count('Q4_K')}" in shown
    assert "quantised to Q4_K, Q6_K before" in shown
