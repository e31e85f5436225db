"""What is said while a server loads: bytes of weights by the private memory of the engine's process."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron.machine.cpu_memory import Sizes
from minitron_triton.server import leftovers
from minitron_triton.server.launch import Served
from minitron_triton.server.leftovers import Process
from minitron_triton.server.loading import Packing, Progress

#: One gigabyte of weights; no step and hardly a layer beside them.
SIZES = Sizes(
    weight_bytes=1_000_000_000, layers=0, vocab_size=0, hidden_size=0, computed_per_token=0, kv_bytes_per_token=1.0,
    screened=False, max_batch_size=1, max_seq_len=32, max_num_tokens=0,
)  # fmt: skip


@contextlib.contextmanager
def taken(size: int) -> Iterator[None]:
    """So many bytes of private memory."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1
        yield


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Packing]:
    """Of this process, as if it were an engine's; it has more than an engine without its weights."""
    me = Process.of(os.getpid())
    assert me
    monkeypatch.setattr(leftovers, "stubs", lambda mark: {"echo_0_0": Process(1, 1), "tensorrt_llm_0_0": me})
    with taken(100_000_000):
        yield Packing(SIZES, "mark")


def test_what_is_packed_grows_with_private_memory(packing: Packing) -> None:
    assert packing.total == 1_000_000_000
    assert packing.bytes() == 0  # nobody knows the process yet
    packing.find()
    before = packing.bytes()
    with taken(200_000_000):
        assert packing.bytes() - before == pytest.approx(200_000_000, rel=0.05)
    assert 0 < packing.bytes() < before + 20_000_000


def test_never_more_than_all_of_it(packing: Packing) -> None:
    packing.find()
    packing.total = 1000
    assert packing.bytes() == 1000


def test_a_line_for_each_model_and_one_every_few_seconds(
    packing: Packing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines by hand. Whoever reads a log has a line a change, not one a look."""
    now, packed = [100.0], [0]
    monkeypatch.setattr("minitron_triton.server.loading.time.monotonic", lambda: now[0])
    monkeypatch.setattr(packing, "bytes", lambda: packed[0])
    with caplog.at_level(logging.INFO), Progress(4, packing) as progress:
        progress.show(0)
        for moment, size, models in [
            (101, 10, 0),
            (104, 250_000_000, 2),
            (106, 3, 2),
            (110, 999_000_000, 2),
            (111, 4, 3),
        ]:
            now[0], packed[0] = moment, size
            progress.show(models)
    assert [record.getMessage() for record in caplog.records] == [
        "loading models: 0 of 4",
        "loading models: 2 of 4, 250.0 MB of 1.00 GB of weights packed",
        "loading models: 2 of 4, 999.0 MB of 1.00 GB of weights packed",
        "loading models: 3 of 4, 4 B of 1.00 GB of weights packed",
    ]


def test_without_an_engine_models_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(tmp_path, "python", ("echo",), "echo", tmp_path, 1, None, 0)
    assert Packing.of(served, "mark") is None
    (tmp_path / "engine").mkdir()
    assert Packing.of(served, "mark") is None  # no CPU engine's
    with caplog.at_level(logging.INFO), Progress(1, None) as progress:
        progress.show(0)
        progress.show(0)
        progress.show(1)
    assert [record.getMessage() for record in caplog.records] == ["loading models: 0 of 1", "loading models: 1 of 1"]
