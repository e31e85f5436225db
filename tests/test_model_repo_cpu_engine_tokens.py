"""Tokens of the CPU engine: greedy, sampled, penalised, ended. Expected ones are transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cpu_engines
from answers import END_ID, Answers
from cpu_engines import EXPECTED, PROMPTS, Caller, greedy, next_logits, run
from minitron.model.precision import ROUNDED, Precision
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation_request import Request

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", cpu_engines.MODELS)
def test_greedy_tokens_equal_those_of_transformers(name: str, precision: Precision) -> None:
    """20 prompts x 64 tokens, all at once, on the checkpoint's (dequantised) weights in float32."""
    answers = Answers.load(name)
    engine = Engine.load(cpu_engines.engine(name, precision), kv_cache_tokens=2048)
    try:
        requests = [Request(prompt, 64, end_ids=frozenset({END_ID})) for prompt in answers.prompts]
        assert run(engine, *requests) == answers.variants[precision].continuations
    finally:
        engine.close()


def test_a_single_stream_gives_token_by_token_what_a_full_engine_gives(engine: Engine) -> None:
    for prompt, expected in list(zip(PROMPTS, EXPECTED, strict=True))[:4]:
        caller = Caller(engine, Request(prompt, 64))
        assert caller.last().finish == "length"
        assert caller.tokens == expected
        assert all(len(chunk.token_ids) == 1 for chunk in caller.chunks)


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(engine: Engine) -> None:
    sampled = [Request(prompt, 24, seed=7, **SAMPLED) for prompt in PROMPTS[:16]]
    alone = [run(engine, request)[0] for request in sampled]
    others = [Request(prompt, 24, seed=n, **SAMPLED) for n, prompt in enumerate(PROMPTS)]
    assert run(engine, *others, *sampled)[len(others) :] == alone
    assert run(engine, Request(PROMPTS[0], 24, seed=8, **SAMPLED))[0] != alone[0]


def test_without_top_k_and_top_p_or_at_temperature_0_the_best_token_is_taken(engine: Engine) -> None:
    """TensorRT-LLM's rule (defaultDecodingParams.h): top_k 0 and top_p 0 together mean greedy, whatever the rest."""
    requests = [
        Request(PROMPTS[0], 16, seed=3, temperature=1.5),
        Request(PROMPTS[0], 16, seed=3, temperature=0.0, top_k=50, top_p=0.9),
        Request(PROMPTS[0], 16, seed=3, temperature=1.5, top_k=1),
    ]
    assert run(engine, *requests) == [EXPECTED[0][:16]] * 3


def test_sampling_keeps_to_the_most_probable(engine: Engine) -> None:
    """top_k 2: each token is one of the two best by the numpy Nemotron, and over 40 seeds both occur."""
    best = np.argsort(next_logits(PROMPTS[2]))[-2:]
    found = run(engine, *(Request(PROMPTS[2], 1, temperature=2.0, top_k=2, seed=seed) for seed in range(40)))
    assert {tokens[0] for tokens in found} == set(best.tolist())


def test_log_probs_are_those_of_the_whole_vocabulary(engine: Engine) -> None:
    caller = Caller(engine, Request(PROMPTS[3], 3))
    caller.last()
    found = [value for chunk in caller.chunks for value in chunk.log_probs]
    for position, token in enumerate(EXPECTED[3][:3]):
        row = next_logits(PROMPTS[3] + EXPECTED[3][:position])
        expected = row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert found[position] == pytest.approx(expected, abs=1e-4)


def test_a_repetition_penalty_counts_prompt_and_output(engine: Engine) -> None:
    prompt = PROMPTS[0]

    def penalise(row: Any, found: list[int]) -> None:
        seen = sorted({*prompt, *found})
        row[seen] = np.where(row[seen] > 0, row[seen] / 1.8, row[seen] * 1.8)

    assert run(engine, Request(prompt, 6, repetition_penalty=1.8))[0] == greedy(prompt, 6, penalise)


def test_the_end_id_ends_and_is_no_output(engine: Engine) -> None:
    end = EXPECTED[0][10]
    caller = Caller(engine, Request(PROMPTS[0], 64, end_ids=frozenset({end})))
    assert caller.last().finish == "end_id"
    assert caller.tokens == EXPECTED[0][: EXPECTED[0].index(end)]


def test_min_tokens_bans_the_end_id(engine: Engine) -> None:
    end = EXPECTED[0][0]  # would end at once
    assert run(engine, Request(PROMPTS[0], 8, end_ids=frozenset({end})))[0] == []

    def ban(row: Any, found: list[int]) -> None:
        if len(found) < 3:
            row[end] = -np.inf

    expected = greedy(PROMPTS[0], 8, ban)
    cut = expected.index(end) if end in expected else 8
    assert run(engine, Request(PROMPTS[0], 8, end_ids=frozenset({end}), min_tokens=3))[0] == expected[:cut]


def test_stop_words_end_and_are_output(engine: Engine) -> None:
    expected = EXPECTED[1]
    never = (expected[4], expected[4], expected[9])
    caller = Caller(engine, Request(PROMPTS[1], 64, stop_words=(never, tuple(expected[5:8]))))
    assert caller.last().finish == "stop_words"
    assert caller.tokens == expected[:8]
    caller = Caller(engine, Request(PROMPTS[1], 64, stop_words=(never,)))
    assert (caller.last().finish, caller.tokens) == ("length", expected)
