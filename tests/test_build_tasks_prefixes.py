"""Texts that begin alike, computed together. The judge of logits is each text alone, through the engine as the text
comparison runs it; that of groups, the least work over all ways to cut, counted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from minitron_build.evaluate.measures import Rows
from minitron_build.evaluate.running import RunningEngine
from minitron_build.evaluate.tasks import prefixes
from minitron_build.evaluate.tasks.grouping import Scored, groups, several
from minitron_build.evaluate.tasks.prefixes import PrefixEngine, common_length

PICK = np.random.default_rng(11)


def ids(count: int) -> list[int]:
    return [int(one) for one in PICK.integers(5, 1000, count)]


@pytest.fixture(scope="module")
def folder(small_engine: Callable[[str], Path]) -> Path:
    return small_engine("bfloat16")


@functools.cache
def running(folder: Path) -> RunningEngine:
    return RunningEngine(folder)


def alone(folder: Path, text: list[int]) -> Rows:
    """Log probs [token, vocabulary] behind each token."""
    window = np.array([*text, 0], np.int64)
    return np.concatenate([rows for rows, _ in running(folder).predictions(window)])


def log_softmax(logits: Rows) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return found


def test_what_follows_a_shared_prefix_is_what_follows_each_text_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes that share a part, are left, are computed anew; texts of other lengths; several steps for one text."""
    monkeypatch.setattr(prefixes, "_MOST_LOGITS", 8 * 1024)  # 8 rows of logits at once
    monkeypatch.setattr(prefixes, "_MOST_HIDDEN", 40)
    engine, start = PrefixEngine(folder), ids(20)
    for prefix in (start, start, start[:12] + ids(5), [], start):
        texts = [ids(count) for count in (3, 17, 1, 8)]
        engine.start(prefix)
        given = np.zeros((4, 17, 1024))
        for before, logits in engine.go_on(texts, 17):
            given[:, 17 - before : 17 - before + logits.shape[1]] = logits
        for rows, text in zip(given, texts, strict=True):
            expected = alone(folder, prefix + text)[len(prefix) :]
            assert np.abs(log_softmax(rows[-len(text) :]) - expected).max() < 2e-4


def test_texts_go_on_token_by_token_and_leave(folder: Path) -> None:
    engine, prefix, texts = PrefixEngine(folder), ids(6), [ids(4), ids(2), ids(5)]
    engine.start(prefix)
    list(engine.go_on(texts, 1))
    more = [[7, 8], [9, 10, 11], [12, 13, 14]]
    engine.step([7, 9, 12], [0, 1, 2])
    engine.step([8, 10, 13], [0, 1, 2])
    rows = engine.step([11, 14], [1, 2])
    for row, text, added in zip(rows, texts[1:], more[1:], strict=True):
        assert np.abs(log_softmax(row) - alone(folder, prefix + text + added)[-1]).max() < 2e-4


def work(text: list[tuple[tuple[int, ...], list[Scored]]]) -> int:
    """Tokens that are computed."""
    return sum(len(prefix) + sum(len(one.text) - len(prefix) for one in group) for prefix, group in text)


def test_groups_take_the_least_work_of_all_cuts() -> None:
    for _ in range(30):
        texts = list({tuple(PICK.integers(0, 2, PICK.integers(2, 9)).tolist()) for _ in range(7)})
        some = [Scored(text, int(PICK.integers(1, len(text) + 1))) for text in texts]
        found = list(groups(some))
        order = sorted(some, key=lambda one: one.text)
        assert [one for _, group in found for one in group] == order
        assert all(one.text[: len(prefix)] == prefix and len(one.text) - len(prefix) >= one.wanted
                   for prefix, group in found if len(group) > 1 for one in group)  # fmt: skip
        places = range(1, len(order))
        ways = [cuts for count in range(len(order)) for cuts in itertools.combinations(places, count)]
        least = min(work([cut(part) for part in parts(order, cuts)]) for cuts in ways)
        assert work(found) == least


def parts(order: list[Scored], cuts: tuple[int, ...]) -> list[list[Scored]]:
    return [order[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(order)])]


def cut(group: list[Scored]) -> tuple[tuple[int, ...], list[Scored]]:
    shared = min([common_length([one.text for one in group]), *(len(one.text) - one.wanted for one in group)])
    return group[0].text[: shared if len(group) > 1 else 0], group


def test_batches_hold_as_many_tokens_as_memory_takes() -> None:
    some = [Scored((1,) * length, 1) for length in (4000, 10, 9000, 20, 4000)]
    assert [[len(one.text) for one in batch] for batch in several(some, 50)] == [[10, 20], [4000, 4000], [9000]]
