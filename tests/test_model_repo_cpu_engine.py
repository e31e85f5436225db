"""The CPU engine as a library: refusals, admission, cancel, faults. Expected tokens are transformers' own."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cpu_engines
from cpu_engines import BF16, EXPECTED, FAULT, PROMPTS, Caller, run
from minitron.machine import cpu_machines, cpu_memory
from minitron.model.precision import Precision
from minitron.model.runtime_limits import TOKENS_PER_BLOCK
from minitron_build.engines.openvino import write as cpu
from minitron_triton.models.tensorrt_llm import pipeline
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.engine_config import EngineConfig
from minitron_triton.models.tensorrt_llm.generation import StepOutput
from minitron_triton.models.tensorrt_llm.generation_request import Refused, Request


@pytest.fixture
def small_room() -> Iterator[Callable[..., Engine]]:
    """``small_room(blocks, max_queue=0)``: an engine of one's own with a KV cache of so many blocks."""
    made: list[Engine] = []

    def load(blocks: int, max_queue: int = 0) -> Engine:
        made.append(cpu_engines.load("other", BF16, blocks=blocks, max_queue=max_queue))
        return made[-1]

    yield load
    for loaded in made:
        loaded.close()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": []}, "Prompt is empty"),
        ({"prompt": [1] * 513}, r"Prompt length \(513\) exceeds maximum input length \(512\)"),
        ({"max_new_tokens": 0}, "request_output_len is 0"),
        ({"max_new_tokens": 511}, r"together exceed the maximum sequence length \(512\)"),
        ({"prompt": [5, 1031]}, "token id 1031: it must be from 0 to 1030"),
        ({"prompt": [5, -1]}, "token id -1"),
        ({"end_ids": frozenset({5, 1031})}, "end_id is 1031"),
        ({"stop_words": ((5, 2000),)}, "stop_words_list"),
        ({"stop_words": ((),)}, "stop_words_list"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"min_tokens": 9}, "min_tokens is 9"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused_and_the_engine_goes_on(engine: Engine, changes: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"prompt": [5, 6], "max_new_tokens": 8, **changes}
    with pytest.raises(Refused, match=text):
        engine.submit(Request(**arguments), lambda chunk: pytest.fail(f"{chunk} was delivered"))
    assert run(engine, Request(PROMPTS[0], 4))[0] == EXPECTED[0][:4]


def test_admission_waits_until_there_is_room_and_nobody_is_evicted(small_room: Callable[..., Engine]) -> None:
    """Each prompt of 6 or 17 tokens with 64 new ones takes three blocks: of four only one fits at a time."""
    engine = small_room(4)
    short = [number for number, prompt in enumerate(PROMPTS) if len(prompt) <= 30][:5]
    callers = [Caller(engine, Request(PROMPTS[number], 64)) for number in short]
    most = 0
    while any(not caller.chunks or not caller.chunks[-1].is_last for caller in callers):
        stats = engine.stats()
        most = max(most, stats.context + stats.generating)
        assert stats.used_blocks <= 4
        for caller in callers:
            if not caller.chunks or not caller.chunks[-1].is_last:
                caller.next()
    assert most == 1
    assert [caller.tokens for caller in callers] == [EXPECTED[number] for number in short]


def test_a_cache_that_fits_exactly_is_enough_and_one_block_less_is_refused(small_room: Callable[..., Engine]) -> None:
    prompt, needed = PROMPTS[5], 7  # 131 tokens and 64 new ones; six blocks of 32 hold 192
    assert run(small_room(needed), Request(prompt, 64))[0] == EXPECTED[5]
    with pytest.raises(Refused, match=rf"need {needed} blocks .* has {needed - 1}.* exceeds"):
        small_room(needed - 1).submit(Request(prompt, 64), lambda _: None)


def test_a_full_queue_refuses_the_surplus_and_serves_the_rest(small_room: Callable[..., Engine]) -> None:
    """The text is that of TensorRT-LLM's executor."""
    engine = small_room(3, max_queue=2)
    callers, refused = [], []
    for _ in range(6):
        try:
            callers.append(Caller(engine, Request(PROMPTS[0], 64)))
        except Refused as error:
            refused.append(str(error))
    assert len(callers) == 3  # one runs, two wait
    assert set(refused) == {"Maximum queue size of 2 has been reached, please try again later"}
    for caller in callers:
        caller.last()
    assert [caller.tokens for caller in callers] == [EXPECTED[0]] * 3


def test_cancelling_ends_the_sequence_and_frees_its_room(small_room: Callable[..., Engine]) -> None:
    engine = small_room(20)
    running = Caller(engine, Request(PROMPTS[0], 480))
    waiting = Caller(engine, Request(PROMPTS[1], 400))
    running.next()
    assert engine.stats().waiting == 1
    before = engine.stats().steps
    engine.cancel(waiting.generation)
    engine.cancel(running.generation)
    assert waiting.last() == StepOutput(finish="cancelled")
    assert running.last().finish == "cancelled"
    assert len(running.tokens) < 100
    wait_until(lambda: engine.stats().used_blocks == 0)
    assert engine.stats().steps <= before + 5
    engine.cancel(running.generation)  # once more does nothing
    assert run(engine, Request(PROMPTS[1], 64))[0] == EXPECTED[1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Gated:
    """A pipeline whose every step waits until it is let through."""

    def __init__(self, real: Any) -> None:
        self._real, self._permits, self.waits = real, threading.Semaphore(0), threading.Event()
        self._is_open = False

    def step(self) -> None:
        if not self._is_open:
            self.waits.set()
            self._permits.acquire()
        self._real.step()

    def let_through(self) -> None:
        """One step, and back to before the next one."""
        self.waits.clear()
        self._permits.release()
        assert self.waits.wait(60)

    def open(self) -> None:
        self._is_open = True
        self._permits.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_prompt_abandoned_half_read_leaves_nothing_wrong_behind(
    small_room: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step reads 175 of its 179 tokens: the last block of the cache is begun and not whole."""
    real = pipeline.open_pipeline
    monkeypatch.setattr(
        pipeline, "open_pipeline", lambda config, **how: real(dataclasses.replace(config, max_num_tokens=176), **how)
    )
    number = max(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    assert len(PROMPTS[number]) == 179
    engine = small_room(64)
    gate = engine._pipeline = Gated(engine._pipeline)
    first = Caller(engine, Request(PROMPTS[5], 64))
    assert gate.waits.wait(60)
    abandoned = Caller(engine, Request(PROMPTS[number], 64))
    gate.let_through()  # the first prompt's own step; the second is seen after it
    engine.cancel(abandoned.generation)  # while its first 175 tokens are about to be read
    gate.let_through()
    gate.let_through()
    assert abandoned.last() == StepOutput(finish="cancelled")
    gate.open()
    assert run(engine, Request(PROMPTS[number], 64))[0] == EXPECTED[number]
    assert first.last().finish == "length" and first.tokens == EXPECTED[5]
    wait_until(lambda: engine.stats().used_blocks == 0)


def test_cancelling_after_the_first_token_ends_the_sequence(engine: Engine) -> None:
    caller = Caller(engine, Request(PROMPTS[0], 480))
    assert list(caller.next().token_ids) == EXPECTED[0][:1]
    engine.cancel(caller.generation)
    assert caller.last().finish == "cancelled" and len(caller.tokens) < 480
    wait_until(lambda: engine.stats().active == 0)


class Failing:
    """A pipeline whose third step raises, and every one after it: OpenVINO's stays broken."""

    def __init__(self, real: Any) -> None:
        self._real, self._steps = real, 0

    def step(self) -> None:
        self._steps += 1
        if self._steps >= 3:
            raise RuntimeError(
                "Exception from src/plugins/cpu/node.cpp:12:\nCheck 'ok' failed at /src/x.cpp:3:\nno ok\n"
            )
        self._real.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_fault_is_answered_to_all_in_flight_and_the_engine_recovers(
    small_room: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = small_room(7)
    engine._pipeline = Failing(engine._pipeline)
    callers = [Caller(engine, Request(PROMPTS[0], 64)) for _ in range(4)]  # two run, two wait
    ends = [caller.last() for caller in callers]
    assert [end.error for end in ends] == ["The engine failed: no ok"] * 2 + [None] * 2
    assert [caller.tokens for caller in callers[2:]] == [EXPECTED[0]] * 2
    assert caplog.text.count(FAULT) == 1
    assert engine.stats().used_blocks == 0


def test_a_request_that_only_the_library_refuses_hurts_nobody_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = pipeline.generation_config

    def spoiled(request: Request, drafts: int) -> Any:
        config = real(request, drafts)
        if request.seed == 13:
            config.max_new_tokens = 0  # the library raises from add_request and stays whole
        return config

    monkeypatch.setattr(pipeline, "generation_config", spoiled)
    good, bad = Caller(engine, Request(PROMPTS[0], 64)), Caller(engine, Request(PROMPTS[0], 64, seed=13))
    assert "max_new_tokens" in (bad.last().error or "")
    assert (good.last().error, good.tokens) == (None, EXPECTED[0])
    assert FAULT not in caplog.text


def test_a_receiver_that_raises_loses_only_its_own_sequence(engine: Engine) -> None:
    def raise_it(_: StepOutput) -> None:
        raise ValueError("the receiver is broken")

    engine.submit(Request(PROMPTS[1], 64), raise_it)
    assert run(engine, Request(PROMPTS[0], 64))[0] == EXPECTED[0]
    wait_until(lambda: engine.stats().active == 0)


def test_closing_cancels_and_refuses(small_room: Callable[..., Engine]) -> None:
    engine = small_room(20)
    caller = Caller(engine, Request(PROMPTS[0], 480))
    caller.next()
    engine.close()
    assert caller.last().finish == "cancelled"
    with pytest.raises(Refused, match="stopping"):
        engine.submit(Request(PROMPTS[0], 1), lambda _: None)
    assert threading.active_count() < 50


def test_nothing_of_the_library_outlives_a_closed_engine(
    small_room: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline and every handle are destroyed by ``close``, although somebody keeps the generations."""
    kept: list[weakref.ref[Any]] = []

    class Pipeline:
        """The real one, and what it gives, in objects that can be watched."""

        def __init__(self, real: Any) -> None:
            self._real = real
            kept.append(weakref.ref(self))

        def add_request(self, *words: Any) -> Any:
            return Pipeline(self._real.add_request(*words))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    real = pipeline.open_pipeline
    monkeypatch.setattr(pipeline, "open_pipeline", lambda *words, **how: Pipeline(real(*words, **how)))
    engine = small_room(40)
    done, left, cut = (Caller(engine, Request(PROMPTS[0], length)) for length in (3, 480, 480))
    done.last()
    left.next()
    engine.cancel(left.generation)
    left.last()
    cut.next()
    engine.close()
    assert cut.last().finish == "cancelled"
    gc.collect()
    assert len(kept) == 5  # the pipeline, the request that warms it up, three more
    assert [one for one in kept if one() is not None] == []


def test_a_request_that_comes_shortly_before_the_end_of_a_step_is_in_the_next(
    small_room: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step keeps the interpreter's lock; Python's own patience with that, 5 ms, is longer than what is left of it.

    The steps here take 3 ms from the moment that somebody is woken to ask something. On a busy machine he may wake too
    late, so that one of twenty is enough; none of them is in time where Python waits for 5 ms.
    """
    libc = ctypes.PyDLL(None)  # which calls without letting go of the lock
    woken, wake = os.pipe()
    armed, begun, started = threading.Event(), [0], dict[int, int]()

    class Pipeline:
        def __init__(self, real: Any) -> None:
            self._real = real

        def add_request(self, key: int, *words: Any) -> Any:
            started[key] = begun[0]
            return self._real.add_request(key, *words)

        def step(self) -> None:
            begun[0] += 1
            if armed.is_set():
                armed.clear()
                libc.write(wake, begun[0].to_bytes(4, "little"), 4)
            libc.usleep(3000)
            self._real.step()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    real = pipeline.open_pipeline
    monkeypatch.setattr(pipeline, "open_pipeline", lambda *words, **how: Pipeline(real(*words, **how)))
    before = sys.getswitchinterval()
    engine = small_room(40)
    busy, in_time = Caller(engine, Request(PROMPTS[0], 480)), []
    busy.next()
    for _ in range(20):
        armed.set()
        number = int.from_bytes(os.read(woken, 4), "little")
        asked = Caller(engine, Request(PROMPTS[1], 1))
        asked.last()
        in_time.append(started[asked.generation.id] == number)
    engine.cancel(busy.generation)
    engine.close()
    os.close(woken)
    os.close(wake)
    sys.setswitchinterval(before)
    assert any(in_time)


def test_a_receiver_that_knows_its_generation_goes_with_the_last_chunk(engine: Engine) -> None:
    """Without a cycle, that is, which only the garbage collector would find: in Triton at the end of the process, where
    a response sender that is still there crashes (seen on 2.51)."""

    class Receiver:
        def __init__(self, prompt: list[int]) -> None:
            self.over = threading.Event()
            self.generation = engine.submit(Request(prompt, 4), self.take)

        def take(self, chunk: StepOutput) -> None:
            if chunk.is_last:
                self.over.set()

    receiver = Receiver(PROMPTS[0])
    assert receiver.over.wait(60)
    kept = weakref.ref(receiver)
    gc.disable()
    try:
        del receiver
        wait_until(lambda: kept() is None)
    finally:
        gc.enable()


def test_fast_execution_is_another_arithmetic(tmp_path: Path) -> None:
    """Answers come, and the plugin is told so: an engine says in config.json how it runs."""
    checkpoint = cpu_engines.checkpoint("other", Precision.INT8_WEIGHT_ONLY)
    cpu.build(checkpoint, tmp_path / "engine", cpu.CpuOptions(execution="fast"))
    exact = EngineConfig.read(cpu_engines.engine("other", Precision.INT8_WEIGHT_ONLY))
    fast = EngineConfig.read(tmp_path / "engine")
    assert exact.properties == {"EXECUTION_MODE_HINT": "ACCURACY"}
    assert fast.properties == cpu_machines.this_machine().properties
    engine = Engine.load(tmp_path / "engine", kv_cache_tokens=512)
    assert len(run(engine, Request(PROMPTS[0], 16))[0]) == 16
    engine.close()


def test_the_cache_is_what_the_limits_can_need_or_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cpu_engines.engine("other", BF16)
    config = EngineConfig.read(folder)
    beside = cpu_memory.read(folder).engine_bytes
    assert config.kv_bytes_per_token == 2 * 3 * 2 * 64 * 4  # keys and values, layers, kv heads, head size, float32
    assert pipeline.kv_blocks(config, tokens=100) == 3
    assert pipeline.kv_blocks(config, tokens=None) == 16 * 512 // TOKENS_PER_BLOCK
    sequence = 512 * config.kv_bytes_per_token
    monkeypatch.setattr(pipeline, "available_bytes", lambda: beside + int(4 * sequence))
    assert pipeline.kv_blocks(config, tokens=None) == 2 * 512 // TOKENS_PER_BLOCK  # half of what is left
    monkeypatch.setattr(pipeline, "available_bytes", lambda: beside + int(1.9 * sequence))
    with pytest.raises(ValueError, match=f"512 tokens needs {sequence:,.0f} bytes"):
        pipeline.kv_blocks(config, tokens=None)


def test_a_folder_that_is_no_cpu_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        Engine.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"build_config": {}}))
    with pytest.raises(ValueError, match="minitron build --target cpu"):
        Engine.load(tmp_path)
