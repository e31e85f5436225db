"""Tokens with their log probs; those of a prompt from the logits that the engine returns of it (``context_logits``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minitron.text.detokenizer import Decoder, Detokenizer
from minitron.text.tensors import Array

_ROWS = 64  # whose probabilities are computed together: 64 MB at a vocabulary of 256,000


@dataclass(frozen=True)
class Token:
    """What a token added to the text, where that begins (characters), and its log prob, None where it is the first.

    ``likeliest``: texts and log probs of the likeliest tokens in its place, and its own, where they were asked for.
    """

    id: int
    text: str
    offset: int
    log_prob: float | None
    likeliest: dict[str, float] | None = None


def of_prompt(decoder: Decoder, ids: Sequence[int], logits: Array, likeliest: int) -> tuple[Token, ...]:
    """The prompt's tokens; their texts joined are its text.

    ``logits`` [prompt, vocabulary]: row i is what the model expects behind token i. A log prob is the natural logarithm
    of their softmax over the whole vocabulary: the model's own, before any temperature.
    """
    expected: list[tuple[float | None, dict[str, float] | None]] = [(None, None)]
    expected += _expected(decoder, ids, logits, likeliest)
    detokenizer, tokens, length = Detokenizer(decoder), [], 0
    for place, (token, (log_prob, best)) in enumerate(zip(ids, expected, strict=True), 1):
        text = detokenizer.feed([token]) + (detokenizer.finish() if place == len(ids) else "")
        if best is not None and log_prob is not None:
            best.setdefault(text, log_prob)
        tokens.append(Token(token, text, length, log_prob, best))
        length += len(text)
    return tuple(tokens)


def log_softmax(logits: Array) -> NDArray[np.float32]:
    """Natural logarithms of the probabilities that rows of logits [..., vocabulary] stand for."""
    rows = logits.astype(np.float32)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def _expected(
    decoder: Decoder, ids: Sequence[int], logits: Array, likeliest: int
) -> Iterator[tuple[float, dict[str, float] | None]]:
    """For each token but the last: the log prob of the one that follows, and the likeliest ones there."""
    for start in range(0, len(ids) - 1, _ROWS):
        rows = log_softmax(logits[start : min(start + _ROWS, len(ids) - 1)])
        for place, row in enumerate(rows, start):
            yield float(row[ids[place + 1]]), _best(decoder, ids[place], row, likeliest) if likeliest else None


def _best(decoder: Decoder, before: int, row: NDArray[np.float32], count: int) -> dict[str, float]:
    """The ``count`` likeliest tokens, best first, each with the text that it adds; of two with one text the better."""
    best: dict[str, float] = {}
    some = np.argpartition(row, -count)[-count:]
    lead = decoder.decode([before])
    for token in some[np.argsort(-row[some], kind="stable")].tolist():
        best.setdefault(decoder.decode([before, token])[len(lead) :], float(row[token]))
    return best
