"""Pieces of one sequence: however the engine's responses are cut, text, count, end and log probs are the same.

The judges are the tokenizer's whole decode and ``str.find``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SMALL_MODEL
from minitron.text.completion import LENGTH, STOP, Completion, Piece, Sampling
from minitron.text.engine import EngineCallError
from minitron.text.prompts import PromptMaker
from minitron.text.tokenizer import TextTokenizer

LIMITS = {"max_input_len": "100", "max_seq_len": "1000", "vocab_size": "1024"}
FEW = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
# Bytes of the fallback (ids 4 to 259) and special tokens (0 to 3) more often than by chance.
TOKEN = st.one_of(st.integers(0, 1023), st.integers(0, 12), st.integers(130, 259))


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(str(SMALL_MODEL))


def response(ids: list[int]) -> dict[str, Any]:
    return {
        "output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(ids)]], np.int32),
        "output_log_probs": -np.array([[ids]], np.float32).reshape(1, 1, -1),
    }


def generated(tokenizer: TextTokenizer, batches: list[list[list[int]]], **options: Any) -> Piece:
    """All pieces of an answer whose responses come in these batches."""
    sampling = Sampling(max_tokens=options.pop("max_tokens", 500), **options)
    prompt = sampling.prompt(PromptMaker(tokenizer, LIMITS), [300])
    completion = Completion(tokenizer, prompt, sampling)
    pieces = []
    for batch in batches:
        pieces.append(completion.feed([response(ids) for ids in batch]))
        if completion.stopped:
            break
    return Piece.join([*pieces, completion.finish()])


@FEW
@given(batches=st.lists(st.lists(st.lists(TOKEN, max_size=3), max_size=3), max_size=12), log_probs=st.booleans())
def test_however_it_comes_the_text_is_the_whole_decode(
    tokenizer: TextTokenizer, batches: list[list[list[int]]], log_probs: bool
) -> None:
    ids = [token for batch in batches for part in batch for token in part]
    expected = tokenizer.decode([300, *ids])[len(tokenizer.decode([300])) :]
    made = generated(tokenizer, batches, log_probs=log_probs)
    assert made.text == expected
    assert (made.tokens, made.finish) == (len(ids), STOP)
    if log_probs:
        assert [token.id for token in made.log_probs] == ids
        assert [token.log_prob for token in made.log_probs] == [-float(token) for token in ids]
        assert "".join(token.text for token in made.log_probs) == expected
        texts = [token.text for token in made.log_probs]
        assert [token.offset for token in made.log_probs] == [len("".join(texts[:n])) for n in range(len(texts))]


@FEW
@given(ids=st.lists(st.integers(300, 1023), min_size=1, max_size=30), data=st.data(), log_probs=st.booleans())
def test_a_stop_text_ends_text_count_and_log_probs_wherever_it_stands(
    tokenizer: TextTokenizer, ids: list[int], data: st.DataObject, log_probs: bool
) -> None:
    whole = tokenizer.decode([300, *ids])[len(tokenizer.decode([300])) :]
    if not whole:
        return
    first = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[first : first + data.draw(st.integers(1, 6))]
    size = data.draw(st.integers(1, 5))
    batches = [[ids[place : place + size]] for place in range(0, len(ids), size)]
    made = generated(tokenizer, batches, stop_words=(stop,), log_probs=log_probs)
    end = whole.find(stop)
    assert made.text == whole[:end] and made.finish == STOP
    # The tokens up to the one with which the stop text is whole.
    length = len(tokenizer.decode([300]))
    counted = next(
        n for n in range(1, len(ids) + 1) if len(tokenizer.decode([300, *ids[:n]])) - length >= end + len(stop)
    )
    assert made.tokens == counted
    if log_probs:
        assert all(token.offset < max(end, 1) for token in made.log_probs)
        assert "".join(token.text for token in made.log_probs)[:end] == whole[:end]


def test_the_end_is_told_apart(tokenizer: TextTokenizer) -> None:
    assert generated(tokenizer, [[[300, 301]]], max_tokens=2).finish == LENGTH
    assert generated(tokenizer, [[[300]]], max_tokens=2).finish == STOP


def test_log_probs_of_another_length_are_an_error(tokenizer: TextTokenizer) -> None:
    sampling = Sampling(max_tokens=5, log_probs=True)
    completion = Completion(tokenizer, sampling.prompt(PromptMaker(tokenizer, LIMITS), [300]), sampling)
    with pytest.raises(EngineCallError, match="1 log probs for 2 tokens"):
        completion.feed([response([300, 301]) | {"output_log_probs": np.zeros((1, 1, 1), np.float32)}])


def test_only_what_differs_from_the_engine_s_own_is_sent() -> None:
    """Names and types are tensorrt_llm's (tests/data/triton_tensors.json); greedy is top-k 1, never temperature 0."""
    greedy = Sampling(max_tokens=5, temperature=0, seed=7).request().arrays
    assert {name: array.tolist() for name, array in greedy.items()} == {"top_k": [[1]]}
    sampled = (
        Sampling(max_tokens=5, seed=7, temperature=0.5, top_k=3, min_tokens=2, presence_penalty=1).request().arrays
    )
    assert {name: (array.dtype.name, array.item()) for name, array in sampled.items()} == {
        "top_p": ("float32", 1.0), "seed": ("uint64", 7), "temperature": ("float32", 0.5), "top_k": ("int32", 3),
        "min_tokens": ("int32", 2), "presence_penalty": ("float32", 1.0),
    }  # fmt: skip
