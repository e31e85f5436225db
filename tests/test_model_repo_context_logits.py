"""Logits of whole prompts from the CPU engine, beside its pipeline: right, whole whatever is cached, in nobody's way.

Expected logits are those of transformers' own model in float32 (``answers``), and of the numpy Nemotron of the tests,
which test_models_reference.py holds against it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cpu_engines
from answers import Answers
from cpu_engines import BF16, EXPECTED, PROMPTS, Caller, run
from minitron.model import shape
from minitron.model.precision import ROUNDED, Precision
from minitron_triton.models.tensorrt_llm import context_logits, pipeline
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.engine_config import EngineConfig
from minitron_triton.models.tensorrt_llm.generation_request import Refused, Request, check
from nemotron_reference import checkpoint_weights, logits

pytestmark = pytest.mark.slow

LONG = next(prompt for prompt in PROMPTS if len(prompt) > context_logits.STEP_TOKENS)


def of_prompt(engine: Engine, prompt: list[int], tokens: int = 1, **options: Any) -> tuple[Any, Caller]:
    """The logits of a prompt, and who asked for them; they come once."""
    caller = Caller(engine, Request(prompt, tokens, context_logits=True, **options))
    assert caller.last().error is None
    assert [chunk.context_logits is not None for chunk in caller.chunks] == [True] + [False] * (len(caller.chunks) - 1)
    return caller.chunks[0].context_logits, caller


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", cpu_engines.MODELS)
def test_logits_are_transformers_own(name: str, precision: Precision) -> None:
    answers = Answers.load(name)
    engine = Engine.load(cpu_engines.engine(name, precision), kv_cache_tokens=2048)
    try:
        for row, (prompt, position) in enumerate(answers.places):
            found, _ = of_prompt(engine, answers.prompts[prompt])
            assert found.shape == (len(answers.prompts[prompt]), answers.variants[precision].logits.shape[1])
            assert np.abs(found[position] - answers.variants[precision].logits[row]).max() < 1e-3
    finally:
        engine.close()


def test_a_cached_prompt_s_logits_are_whole(engine: Engine) -> None:
    """Two steps of them; the pipeline's prefix cache holds the prompt, from before and from the same request."""
    sizes = shape.read(cpu_engines.model("other") / "config.json")
    expected = logits(checkpoint_weights(cpu_engines.checkpoint("other", BF16)), sizes, np.array(LONG))
    assert run(engine, Request(LONG, 4)) == [EXPECTED[PROMPTS.index(LONG)][:4]]
    for tokens in (4, 1, 4):
        found, caller = of_prompt(engine, LONG, tokens)
        assert np.abs(found - expected).max() < 1e-3
        assert caller.tokens == EXPECTED[PROMPTS.index(LONG)][:tokens]


def test_one_token_is_what_the_pipeline_would_give(engine: Engine) -> None:
    """It is taken from the logits, without the pipeline: token, log prob and every way of ending."""
    first = EXPECTED[0][0]
    for options in ({}, {"end_ids": frozenset({first})}, {"stop_words": ((first,),)}, {"end_ids": frozenset({999})}):
        by_pipeline = Caller(engine, Request(PROMPTS[0], 1, **options))
        last = by_pipeline.last()
        steps = engine.stats().steps
        _, caller = of_prompt(engine, PROMPTS[0], 1, **options)
        assert engine.stats().steps == steps
        assert (caller.tokens, caller.chunks[-1].finish) == (by_pipeline.tokens, last.finish)
        assert caller.chunks[-1].log_probs == pytest.approx(last.log_probs, abs=1e-4)
        times = caller.generation.times
        assert (
            times.arrival_ns <= times.first_scheduled_ns <= times.first_token_ns == times.last_token_ns
            or not last.token_ids
        )


@pytest.mark.parametrize(
    "options", [{"temperature": 1.5, "top_k": 40, "seed": 5}, {"repetition_penalty": 1.8}, {"min_tokens": 1}]
)
def test_one_token_that_is_not_the_likeliest_is_the_pipeline_s(engine: Engine, options: dict[str, Any]) -> None:
    ends = frozenset({EXPECTED[0][0]})
    expected = run(engine, Request(PROMPTS[0], 1, end_ids=ends, **options))[0]
    _, caller = of_prompt(engine, PROMPTS[0], 1, end_ids=ends, **options)
    assert caller.tokens == expected


class Held:
    """``engine``'s plain model waits before each step until ``go`` is set; ``steps``: where each starts."""

    engine: Engine

    def __init__(self) -> None:
        self.go, self.begun, self.steps = threading.Event(), threading.Event(), list[int]()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """An engine with a queue of three, whose plain model waits."""
    one = Held()

    class Waiting(pipeline.PlainModel):
        def infer(self, ids: Any, start: int) -> Any:
            one.steps.append(start)
            one.begun.set()
            assert one.go.wait(60)
            return super().infer(ids, start)

    monkeypatch.setattr(pipeline, "PlainModel", Waiting)
    one.engine = cpu_engines.load("other", BF16, blocks=40, max_queue=3)
    yield one
    one.go.set()
    one.engine.close()


def test_others_generate_meanwhile_and_who_leaves_is_not_computed(held: Held) -> None:
    engine = held.engine
    first, second, third = (Caller(engine, Request(LONG, 2, context_logits=True)) for _ in range(3))
    assert engine.stats().waiting == 3
    assert run(engine, Request(PROMPTS[0], 8)) == [EXPECTED[0][:8]]
    with pytest.raises(Refused, match="Maximum queue size of 3"):
        engine.submit(Request(LONG, 2, context_logits=True), lambda _: None)
    assert held.begun.wait(60)
    for left in (second, first):  # one before its turn, one in the middle of it
        engine.cancel(left.generation)
        assert left.last().finish == "cancelled"
    held.go.set()
    assert third.last().finish == "length" and third.tokens == EXPECTED[PROMPTS.index(LONG)][:2]
    assert held.steps == [0, 0, context_logits.STEP_TOKENS]  # of the first one's two, and none of the second's
    assert engine.stats().active == 0


def test_an_engine_that_ends_answers_those_that_wait(held: Held) -> None:
    callers = [Caller(held.engine, Request(LONG, 2, context_logits=True)) for _ in range(2)]
    threading.Timer(0.2, held.go.set).start()
    held.engine.close()
    assert [caller.last().finish for caller in callers] == ["cancelled"] * 2


def test_a_fault_is_answered_and_the_next_one_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [RuntimeError("no memory\nat src/plugin.cpp:13"), None]
    whole = pipeline.PlainModel

    def open_model(config: EngineConfig) -> Any:
        if fault := faults.pop():
            raise fault
        return whole(config)

    faults.reverse()
    monkeypatch.setattr(pipeline, "PlainModel", open_model)
    engine = cpu_engines.load("other", BF16, blocks=40)
    try:
        caller = Caller(engine, Request(PROMPTS[0], 1, context_logits=True))
        assert caller.last().error == "The logits of the prompt could not be computed: no memory"
        assert of_prompt(engine, PROMPTS[0])[1].tokens == EXPECTED[0][:1]
    finally:
        engine.close()


def test_more_than_a_response_holds_is_refused() -> None:
    """2 GiB of float32 are 2,097 tokens of 256,000, less the megabyte that is kept free."""
    config = dataclasses.replace(
        EngineConfig.read(cpu_engines.engine("small", BF16)), vocab_size=256_000, max_input_len=4096, max_seq_len=4097
    )
    check(Request([5] * 2096, 1, context_logits=True), config)
    with pytest.raises(Refused, match="at most 2096 tokens can have them"):
        check(Request([5] * 2097, 1, context_logits=True), config)
    check(Request([5] * 2097, 1), config)
