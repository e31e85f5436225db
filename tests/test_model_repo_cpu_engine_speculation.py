"""Prompt lookup: the tokens are those that come without it, and several come at once.

Expected tokens are transformers' own, or those of the same engine without drafts where a request is not greedy or has
end ids. What is drafted is searched for here in the plainest way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpu_engines
import serving
from answers import Answers
from conftest import minitron
from cpu_engines import BF16, FAULT, Caller, run
from minitron.machine import cpu_execution
from minitron.model.precision import ROUNDED, Precision
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.engine_config import EngineConfig
from minitron_triton.models.tensorrt_llm.generation_request import Request
from minitron_triton.models.tensorrt_llm.speculation import NGRAM, Drafts, first_count

ANSWERS = Answers.load("small")
PROMPTS, EXPECTED = ANSWERS.prompts, ANSWERS.variants[BF16].continuations


@pytest.fixture(scope="module", autouse=True)
def _avx2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A processor with which streams begin with one draft and have eight in a loop."""
    info = tmp_path_factory.mktemp("proc") / "cpuinfo"
    info.write_text("flags : avx2\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_execution, "CPUINFO", info)
        yield


@pytest.fixture(scope="module")
def looking() -> Iterator[Engine]:
    """The small Minitron with prompt lookup."""
    with contextlib.closing(cpu_engines.load("small", BF16, blocks=80, prompt_lookup=True)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The small Minitron without."""
    with contextlib.closing(cpu_engines.load("small", BF16, blocks=80)) as loaded:
        yield loaded


def log_probs(caller: Caller) -> list[float]:
    return [value for chunk in caller.chunks for value in chunk.log_probs]


def drafts_of(caller: Caller) -> Drafts:
    assert caller.generation.drafts is not None
    return caller.generation.drafts


def draft(tokens: list[int], count: int) -> list[int]:
    """What follows the first place where the last three tokens stood before, else the last two, else the last one."""
    for size in range(min(NGRAM, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + count]
    return []


def slow_but_bfloat16() -> list[Any]:
    return [one if one is BF16 else pytest.param(one, marks=pytest.mark.slow) for one in ROUNDED]


@pytest.mark.parametrize("precision", slow_but_bfloat16())
@pytest.mark.parametrize("name", cpu_engines.MODELS)
def test_greedy_tokens_equal_those_of_transformers(name: str, precision: Precision) -> None:
    answers = Answers.load(name)
    with contextlib.closing(cpu_engines.load(name, precision, blocks=64, prompt_lookup=True)) as engine:
        requests = [Request(prompt, 64) for prompt in answers.prompts]
        assert run(engine, *requests) == answers.variants[precision].continuations
        assert run(engine, requests[3]) == [answers.variants[precision].continuations[3]]
        assert 0 < engine.stats().accepted_draft_tokens < engine.stats().draft_tokens


def test_one_stream_takes_fewer_steps_and_gives_the_same_log_probs(looking: Engine, plain: Engine) -> None:
    """The drafts that are counted are those that the library made: each chunk has those that were right, and one."""
    for prompt, expected in list(zip(PROMPTS, EXPECTED, strict=True))[:6]:
        before = looking.stats()
        caller, other = Caller(looking, Request(prompt, 64)), Caller(plain, Request(prompt, 64))
        assert (caller.last().finish, other.last().finish) == ("length", "length")
        assert caller.tokens == other.tokens == expected
        assert log_probs(caller) == pytest.approx(log_probs(other), abs=1e-4)
        after = looking.stats()
        assert after.steps - before.steps == len(caller.chunks) < 64
        drafted = right = 0
        tokens = list(prompt)
        for chunk in caller.chunks:
            if tokens != prompt:  # none with the prompt's own step
                there = draft(tokens, min(drafts_of(caller).count, 63 - len(tokens) + len(prompt)))
                drafted += len(there)
                right += len(chunk.token_ids) - 1
                assert there[: len(chunk.token_ids) - 1] == list(chunk.token_ids[:-1])
            tokens += chunk.token_ids
        assert drafts_of(caller).count == 1  # 64 tokens are too few for a change
        assert (after.draft_tokens - before.draft_tokens, drafts_of(caller).drafted) == (drafted, drafted)
        assert after.accepted_draft_tokens - before.accepted_draft_tokens == right


def long_one(engine: Engine, **how: Any) -> Caller:
    """A text of the small Minitron that is in a loop before long."""
    caller = Caller(engine, Request(PROMPTS[7], 400, **how))
    caller.last()
    return caller


def test_a_text_that_repeats_itself_gets_more_drafts_without_another_token(looking: Engine, plain: Engine) -> None:
    caller, other = long_one(looking), long_one(plain)
    assert caller.tokens == other.tokens
    assert log_probs(caller) == pytest.approx(log_probs(other), abs=1e-4)
    assert drafts_of(caller).count > 1
    assert len(caller.chunks) < 200
    assert max(len(chunk.token_ids) for chunk in caller.chunks) > 2


def test_what_ends_in_the_middle_of_a_draft_ends_there(looking: Engine) -> None:
    """At a token that came first as a draft that was right, with another token of the same step behind it."""
    found = 0
    for prompt, expected in zip(PROMPTS, EXPECTED, strict=True):
        caller = Caller(looking, Request(prompt, 64))
        caller.last()
        place = 0
        for chunk in caller.chunks:
            if len(chunk.token_ids) > 1 and (end := expected[place]) not in expected[:place]:
                ended = Caller(looking, Request(prompt, 64, end_ids=frozenset({end})))
                assert (ended.last().finish, ended.tokens) == ("end_id", expected[:place])
                stopped = Caller(looking, Request(prompt, 64, stop_words=((end,),)))
                assert (stopped.last().finish, stopped.tokens) == ("stop_words", expected[: place + 1])
                found += 1
            place += len(chunk.token_ids)
    assert found > 3


def test_end_ids_are_held_back_for_as_long_as_without_drafts(looking: Engine, plain: Engine) -> None:
    """The library alone holds back some that may come, and lets some come that may not (OpenVINO GenAI 2026.4.1)."""
    for number, (prompt, expected) in enumerate(zip(PROMPTS[:10], EXPECTED, strict=False)):
        ends = frozenset(expected[::3])
        requests = [Request(prompt, 64, end_ids=ends, min_tokens=least) for least in (1 + number, 12, 40)]
        assert run(looking, *requests) == run(plain, *requests)


def test_drafts_of_many_streams_never_have_more_rows_than_a_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The library alone gives wrong tokens there, or raises for good."""
    config = dataclasses.replace(EngineConfig.read(cpu_engines.engine("small", BF16)), max_num_tokens=9)
    monkeypatch.setattr(EngineConfig, "read", lambda _: config)
    with contextlib.closing(cpu_engines.load("small", BF16, blocks=64, prompt_lookup=True)) as engine:
        callers = [Caller(engine, Request(prompt, 64)) for prompt in PROMPTS]
        assert engine.stats().context + engine.stats().generating <= 4
        for caller in callers:
            assert caller.last().error is None
        assert [caller.tokens for caller in callers] == EXPECTED
        assert FAULT not in caplog.text


def test_the_same_seed_gives_the_same_tokens_as_without_and_whatever_else_runs(looking: Engine, plain: Engine) -> None:
    sampled = [Request(prompt, 24, seed=7, temperature=1.0, top_k=40, top_p=0.9) for prompt in PROMPTS[:8]]
    alone = [run(looking, request)[0] for request in sampled]
    assert run(looking, *[Request(prompt, 64) for prompt in PROMPTS[8:14]], *sampled)[6:] == alone
    assert run(plain, *sampled) == alone
    how = {"temperature": 0.3, "top_p": 0.5, "seed": 11}  # in a loop as well: another number of drafts would pay
    caller = long_one(looking, **how)
    assert caller.tokens == long_one(plain, **how).tokens != long_one(plain).tokens
    assert drafts_of(caller).count == 1


def test_a_stream_that_is_left_in_the_middle_frees_its_room(looking: Engine, plain: Engine) -> None:
    caller = Caller(looking, Request(PROMPTS[7], 1500))
    while drafts_of(caller).count == 1:
        caller.next()
    looking.cancel(caller.generation)
    assert caller.last().finish == "cancelled"
    assert long_one(looking).tokens == long_one(plain).tokens
    assert looking.stats().active == 0


def test_as_many_drafts_as_would_have_been_fastest() -> None:
    """By hand, tokens over time. In a loop all drafts are right: 9 tokens for 9 rows."""
    loop, new = [1, 2, 3, 4, 5, 6] * 10, list(range(100, 160))
    flat, steep, step = {1: 1.0, 100: 10.9}, {1: 1.0, 100: 100.0}, {1: 1.0, 4: 1.0, 5: 4.0, 100: 99.0}

    def best(tokens: list[int], streams: int, times: dict[int, float], rows: int = 1, room: int = 99) -> int:
        drafts = Drafts(tokens[:20])
        assert drafts.take(tokens[20:], 100, is_first=True) == (0, 0)
        return drafts.best_count([rows] * (streams - 1), times, room)

    assert best(loop, 1, flat) == 8  # 9 / 1.8 against 4 / 1.3
    assert best(loop, 64, flat) == 1  # (63 + 9) / 8.1 against (63 + 2) / 7.4: not worth a change
    assert best(loop, 1, steep) == 1  # 9 / 9 against 2 / 2: the rows are all that counts
    assert best(loop, 1, step) == 3  # 4 / 1 against 9 / 8
    assert best(loop, 2, step, rows=2) == 1  # (1 + 2) / 1 against (1 + 4) / 5: two rows are the other's
    assert best(new, 1, flat) == 1
    assert best(loop, 1, flat, room=8) == 3  # nine rows are too many
    sixteen = EngineConfig.read(cpu_engines.engine("small", BF16))
    one = dataclasses.replace(sixteen, max_batch_size=1)
    assert [first_count(times, one) for times in (flat, steep, step)] == [1, 1, 3]
    assert first_count(step, dataclasses.replace(one, max_num_tokens=3)) == 2
    assert first_count(step, sixteen) == 1
    drafts = Drafts([1, 2])
    assert not drafts.is_due
    drafts.take([3] * 24, 100, is_first=True)
    assert drafts.is_due
    drafts.decide(4)
    drafts.take([3] * 40, 100, is_first=False)
    assert not drafts.is_due  # the second change waits twice as long
    drafts.take([3] * 8, 100, is_first=False)
    assert drafts.is_due


def test_how_long_steps_are_follows_from_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows to one: 1.1 to 1.4 with AVX-512, 2.2 to 2.9 without (contract: cpu-engine.md)."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_execution, "CPUINFO", info)
    assert cpu_execution.processor_flags() == frozenset()
    info.write_text("processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu avx2 avx512f avx512_vnni\n")
    flags = cpu_execution.processor_flags()
    assert flags == {"fpu", "avx2", "avx512f", "avx512_vnni"}
    assert 1.1 <= cpu_execution.step_times("exact", flags)[4] <= 1.4
    assert 2.2 <= cpu_execution.step_times("exact", {"avx2"})[4] <= 2.9
    assert cpu_execution.step_times("fast", flags)[4] < 1.1
    assert cpu_execution.step_times("fast", frozenset()) == cpu_execution.step_times("exact", frozenset())
    for kinds in cpu_execution.STEP_TIMES.values():
        for times in kinds.values():
            assert list(times) == sorted(times) and list(times.values()) == sorted(times.values())


@pytest.mark.server
@pytest.mark.slow
def test_a_server_streams_what_a_step_brings_and_counts_the_drafts(
    small_engine: Callable[[str], Path], server: dict[str, Any], tmp_path: Path
) -> None:
    """Ids and text are those of a server without prompt lookup."""
    repository = tmp_path / "repository"
    minitron("render", small_engine("bfloat16"), "--output", repository, "--speculation", "prompt_lookup")
    ids = {"input_ids": np.array([PROMPTS[7]], np.int32), "input_lengths": len(PROMPTS[7]), "request_output_len": 300}
    text = {"text_input": "And it came to pass", "max_tokens": 200}
    with serving.server(repository) as looking:
        streams = [serving.Stream(one["urls"]["grpc"]) for one in (looking, server)]
        try:
            found, expected = (one.responses("tensorrt_llm", **ids, streaming=True) for one in streams)
            whole = streams[0].responses("tensorrt_llm", **ids, return_perf_metrics=True)
            pieces, told = (one.responses("tensorrt_llm_bls", **text, stream=True) for one in streams)
        finally:
            for one in streams:
                one.close()
        samples = urllib.request.urlopen(f"http://{looking['urls']['metrics']}/metrics", timeout=10).read().decode()
    tokens = [part["output_ids"].reshape(-1).tolist() for part in found]
    assert max(map(len, tokens)) > 1
    assert [int(part["sequence_length"][0, 0]) for part in found] == [len(part) for part in tokens]
    streamed = [token for part in tokens for token in part]
    assert streamed == [int(part["output_ids"][0, 0, 0]) for part in expected]
    assert whole[0]["output_ids"].reshape(-1).tolist() == streamed
    drafted, accepted = (int(whole[0][f"total_{kind}draft_tokens"][0, 0]) for kind in ("", "accepted_"))
    assert 0 < accepted < drafted
    assert accepted == 300 - len(tokens)  # the same steps again: each gives one token of its own
    assert float(whole[0]["acceptance_rate"][0, 0]) == pytest.approx(accepted / drafted)
    assert serving.text_of(pieces) == serving.text_of(told)
    counts = dict(re.findall(r'^minitron_draft_tokens_total\{draft_type="(\w+)".*\} (\d+)', samples, re.MULTILINE))
    assert int(counts["accepted"]) >= 2 * accepted and int(counts["drafted"]) >= 2 * drafted
