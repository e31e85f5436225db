"""What a CPU server takes of the memory: sums by hand, and (slow) a real server beside them.

That private memory of the full 4B shape agrees with what was measured is held in ``test_build_plan``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cpu_engines
import serving
from minitron.machine import cpu_memory
from minitron.machine.cpu_memory import Sizes, peak
from minitron.model.precision import Precision
from minitron_client import Client
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render
from minitron_triton.server import cpu_memory as of_servers
from minitron_triton.server import leftovers

#: A model of 1,000 words and 2 layers, hidden 64, with 4 heads of 16 that share 2 keys, and an inner size of 128.
SIZES = Sizes(
    weight_bytes=1_000_000, layers=2, vocab_size=1000, hidden_size=64,
    computed_per_token=cpu_memory.computed_per_token(64, (4 + 2 * 2) * 16, 128), kv_bytes_per_token=512, screened=False,
    max_batch_size=4, max_seq_len=100, max_num_tokens=256,
)  # fmt: skip


def test_buffers_of_a_step() -> None:
    # A token: residual, norm and attention's output 3 x 64, qkv 128, the MLP 2 x 128: 576 elements of 4 bytes.
    assert SIZES.computed_per_token == 576
    # 256 tokens x 576 x 4 bytes x 1.7, and two rows of 1,000 logits in 4 bytes for each of 4 sequences.
    assert SIZES.step_bytes == int(1.7 * 589_824 + 32_000)
    # A screened head has 256 candidates' rows of 64 in 4 bytes for each sequence besides.
    assert dataclasses.replace(SIZES, screened=True).step_bytes == int(1.7 * 589_824 + 32_000 + 4 * 65_536)


def test_the_cache_that_an_engine_chooses() -> None:
    # 100 tokens are 4 blocks of 32, which are 65,536 bytes; a full batch has four times as many.
    assert SIZES.sequence_tokens == 128
    assert SIZES.kv_tokens(SIZES.engine_bytes + 2 * 4 * 65_536) == 512
    assert SIZES.kv_tokens(SIZES.engine_bytes + 2 * 4 * 65_536 - 1) == 512 - 32  # half of what is left
    assert SIZES.kv_tokens(SIZES.engine_bytes + 2 * 65_536 - 1) == 0
    assert SIZES.kv_tokens(0) == 0


def test_the_peak_is_loading_or_what_is_private() -> None:
    small, large = peak(SIZES, 512), peak(SIZES, 1_000_000)
    assert large.kv_cache == 512_000_000 and small.kv_cache == 262_144
    assert small.total == small.loading > small.private
    assert large.total == large.private > large.loading == small.loading
    more = peak(dataclasses.replace(SIZES, weight_bytes=3_000_000), 512)
    assert (more.private - small.private, more.loading - small.loading) == (2_000_000, 4_000_000)


def test_each_process_of_text_has_its_tokenizer() -> None:
    one, three = (peak(SIZES, 0, tokenizer_bytes=1_000_000, text_models=count) for count in (1, 3))
    assert (one.ensemble, three.ensemble) == (0, 32_000_000)  # 16 times the file for each, from the first request on
    assert three.text - one.text == 40_000_000
    assert (three.private - one.private, three.loading - one.loading) == (72_000_000, 40_000_000)
    assert peak(SIZES, 0, tokenizer_bytes=2_000_000, text_models=1).text - one.text == 16_000_000
    beside = peak(SIZES, 0, tokenizer_bytes=1_000_000, text_models=3, gateway=True)
    assert beside.text - three.text > 36_000_000  # a process, and its tokenizer


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("memory") / "repository"
    engine = cpu_engines.engine("small", Precision.INT8_WEIGHT_ONLY)
    render(engine, output, RepositoryOptions(max_tokens_in_paged_kv_cache=512))
    yield output


@pytest.mark.slow
def test_a_real_server_takes_what_was_predicted(repository: Path) -> None:
    """Private memory of all its processes (proc(5), status: RssAnon) after a full batch, and another; no ensemble."""
    expected = of_servers.of_repository(repository, 1 << 34)
    with serving.server(repository) as state:
        with Client(state["urls"]["grpc"], deadline_s=60) as client:

            def ask(number: int) -> None:
                assert list(client.stream(f"{number} " + "In the beginning " * 20, max_tokens=8))[-1].finish_reason

            with ThreadPoolExecutor(16) as asking:
                list(asking.map(ask, range(32)))
        pids = [state["process"].pid, *(one.pid for one in leftovers.processes(state["mark"]))]
        found = sum(map(_private, dict.fromkeys(pids)))
    assert expected.private - expected.ensemble == pytest.approx(found, rel=0.1)


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
