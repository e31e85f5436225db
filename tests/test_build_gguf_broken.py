"""Broken GGUF files end in one ModelError, soon and in bounded memory, whatever is wrong with them."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import gguf_files
from conftest import DATA, SMALL_MODEL
from minitron.errors import ModelError
from minitron_build.sources.gguf import GgufModel
from minitron_build.sources.gguf_file import GgufFile

VARIANTS = 2000
LYING_NUMBERS = (0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def open_and_read(path: Path) -> None:
    """What converting does with a file before and while it reads weights."""
    with GgufModel(path) as model:
        model.tokenizer_files()
        for tensor in model.tensors().values():
            tensor.read(0, min(2, tensor.shape[0]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = gguf_files.write_model(SMALL_MODEL, tmp_path_factory.mktemp("gguf"), "BF16")
    open_and_read(path)
    return path.read_bytes()


@pytest.fixture(params=["plain", "quantised"])
def either(request: pytest.FixtureRequest, whole: bytes) -> bytes:
    """The whole file, and one with the blocks of Q4_K, Q6_K and F32 that llama.cpp wrote."""
    return whole if request.param == "plain" else (DATA / "gguf" / "tiny-Q4_K_M.gguf").read_bytes()


@pytest.mark.slow
def test_two_thousand_fuzzed_variants(either: bytes, tmp_path: Path) -> None:
    """Truncated, bytes changed, numbers of the header replaced by lying ones, pieces moved: never another error."""
    pick = np.random.default_rng(11)
    path = tmp_path / "fuzzed.gguf"
    header = either.index(b"output_norm.bias") + 200
    refused, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for variant in range(VARIANTS):
        path.write_bytes(fuzzed(either, header, variant, pick))
        started = time.monotonic()
        try:
            open_and_read(path)
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
        slowest = max(slowest, time.monotonic() - started)
    assert refused > VARIANTS / 4
    assert slowest < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def fuzzed(whole: bytes, header: int, variant: int, pick: np.random.Generator) -> bytes:
    if variant % 4 == 0:
        return whole[: int(pick.integers(0, header if variant % 8 else len(whole)))]
    data = bytearray(whole)
    if variant % 4 == 1:
        for place in pick.integers(0, header, int(pick.integers(1, 8))):
            data[place] = int(pick.integers(0, 256))
    elif variant % 4 == 2:
        place, number = int(pick.integers(4, header)), LYING_NUMBERS[int(pick.integers(len(LYING_NUMBERS)))]
        data[place : place + 8] = struct.pack("<Q", number)
    else:
        start, length = (int(n) for n in pick.integers(4, 4000, 2))
        piece = data[start : start + length]
        place = int(pick.integers(4, header))
        data[place : place + (0 if variant % 8 == 3 else length)] = piece
    return bytes(data)


def named(whole: bytes) -> dict[str, bytes]:
    """Files broken in one way each, with the words that the message must have."""
    count, keys = whole[8:16], whole[16:24]
    head = whole[:8]
    info = whole.index(b"token_embd.weight") + len(
        b"token_embd.weight"
    )  # axes u32, sizes 2 x u64, type u32, offset u64
    return {
        "is no GGUF file": b"GGML" + whole[4:],
        "version 1": whole[:4] + struct.pack("<I", 1) + whole[8:],
        "version 4": whole[:4] + struct.pack("<I", 4) + whole[8:],
        "big-endian": whole[:4] + struct.pack(">I", 3) + whole[8:],
        "truncated: tensor": whole[:-4096],
        "truncated: 8": whole[:20],
        "is truncated": head + count + struct.pack("<Q", 2**60) + whole[24:],
        "truncated: ": head + struct.pack("<Q", 2**60) + keys + whole[24:],
        "type that is not known": whole[: info + 20] + struct.pack("<I", 999) + whole[info + 24 :],
        "overlaps": whole[: info + 24] + struct.pack("<Q", 32) + whole[info + 32 :],
        "axes": whole[:info] + struct.pack("<I", 2**31) + whole[info + 4 :],
        "has shape": whole[: info + 4] + struct.pack("<QQ", 2**62, 2**62) + whole[info + 20 :],
    }


def test_each_kind_of_damage_is_named(whole: bytes, tmp_path: Path) -> None:
    for said, data in named(whole).items():
        (tmp_path / "broken.gguf").write_bytes(data)
        with pytest.raises(ModelError, match=r"broken\.gguf") as caught:
            open_and_read(tmp_path / "broken.gguf")
        assert said in str(caught.value), said


def test_a_key_may_stand_once(tmp_path: Path) -> None:
    twice = b"".join(gguf_files._string("a") + struct.pack("<II", gguf_files.U32, 1) for _ in range(2))
    (tmp_path / "twice.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + twice)
    with pytest.raises(ModelError, match="key 'a' twice"):
        GgufFile(tmp_path / "twice.gguf")


def test_version_2_is_read_too(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "two.gguf", gguf_files.metadata_of(SMALL_MODEL), [], version=2)
    with GgufFile(tmp_path / "two.gguf") as file:
        assert file.metadata["general.architecture"] == "nemotron"
