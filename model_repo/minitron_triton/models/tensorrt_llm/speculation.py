"""Prompt lookup: drafts of a sequence's next tokens, taken from behind the place where its last ones stood before.

OpenVINO GenAI drafts, and checks the drafts in the step that computes the next token: what is right is kept, so a text
that repeats itself gets several tokens a step, and the tokens are those that would have come anyway. It does not tell
what it drafted. Its rule (2026.4.1; the tests hold it against what comes) is followed here, to count drafts, and to
find how many are worth their rows.

What the rest of the engine sees to, because the library does not:

* Every request of such a pipeline has the rows of its drafts in every step, whether any were found or not: by the time
  that steps take. There is no request without; ``LEAST`` is the least.
* Steps that would have more rows than ``max_num_batched_tokens`` give wrong tokens or break the pipeline.
* ``min_new_tokens`` is not obeyed in steps with drafts.
* The number of drafts is fixed for a request: for another one the sequence goes on in a new request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .engine_config import EngineConfig

NGRAM = 3
"""The longest piece that is looked for; where it is not there, a shorter one is."""

LEAST = 1
COUNTS = (LEAST, 2, 3, 8)
"""Drafts a step. Three for one stream are four rows: with AVX-512 hardly longer than two."""

#: Tokens that a decision looks back on, and tokens from a change to the next decision: twice as many each time.
_WINDOW = 24
#: A change has to promise so much: the new request computes part of a block of the KV cache again.
_WORTH_A_CHANGE = 1.1
#: So much longer may steps get by drafts of which nobody knows yet whether they are right.
_HARDLY_LONGER = 1.05


def first_count(times: Mapping[int, float], engine: EngineConfig) -> int:
    """How many drafts a sequence begins with, ``times`` being those of steps by their rows.

    In an engine for one sequence as many as make steps hardly longer than the least do, else the least: what comes
    beside it would pay for more.
    """
    if engine.max_batch_size > 1:
        return LEAST
    rows = [1 + count for count in COUNTS if 1 + count <= engine.max_num_tokens]
    durations = np.interp(rows, list(times), list(times.values()))
    return max(row for row, time in zip(rows, durations, strict=True) if time <= _HARDLY_LONGER * durations[0]) - 1


class Lookup:
    """The tokens of a sequence, prompt and output, and where each of their n-grams stands first."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._first: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``."""
        for token in tokens:
            self.tokens.append(token)
            length = len(self.tokens)
            for size in range(1, min(NGRAM, length) + 1):
                self._first.setdefault(tuple(self.tokens[length - size :]), length)

    def draft(self, length: int, count: int) -> list[int]:
        """At most ``count`` tokens that the library drafts behind the first ``length``.

        They are those behind the first place of the longest n-gram, of the last tokens, that stood before.
        """
        for size in range(min(NGRAM, length - 1), 0, -1):
            end = self._first[tuple(self.tokens[length - size : length])]
            if end < length:
                return self.tokens[end : min(end + count, length)]
        return []


class Drafts:
    """The drafts of one sequence: how many a step has, and what came of them."""

    def __init__(self, prompt: Sequence[int], count: int = LEAST) -> None:
        self.count = count
        self.drafted = self.accepted = 0
        self._lookup = Lookup(prompt)
        self._wait = _WINDOW
        self._next_decision = len(prompt) + self._wait

    def take(self, tokens: Sequence[int], room: int, *, is_first: bool) -> tuple[int, int]:
        """Note the tokens of a step; return how many were drafted for it and how many of those were right.

        ``room``: tokens that the pipeline's request could still give; no draft comes with its first (``is_first``).
        """
        drafted = accepted = 0
        if not is_first:
            drafted = len(self._lookup.draft(len(self._lookup.tokens), min(self.count, room - 1)))
            accepted = len(tokens) - 1
        self._lookup.extend(tokens)
        self.drafted += drafted
        self.accepted += accepted
        return drafted, accepted

    @property
    def is_due(self) -> bool:
        """Whether enough tokens came since the last change for another decision."""
        return len(self._lookup.tokens) >= self._next_decision

    def best_count(self, others: Sequence[int], times: Mapping[int, float], room: int) -> int:
        """How many drafts a step would have served best over the last tokens, beside ``others`` with so many rows each.

        A step of so many rows takes ``times`` (or between two of them), and gives a token to each stream, and to this
        one the right drafts. A change needs ``room`` for the rows of the sequence once more.
        """
        possible = [self.count, *(count for count in COUNTS if 1 + count <= room)]
        speeds = {count: self._speed(count, others, times) for count in possible}
        best = max(sorted(possible), key=speeds.__getitem__)
        return best if speeds[best] >= _WORTH_A_CHANGE * speeds[self.count] else self.count

    def _speed(self, count: int, others: Sequence[int], times: Mapping[int, float]) -> float:
        tokens = self._lookup.tokens
        at = len(tokens) - _WINDOW
        given = steps = 0
        while at < len(tokens):
            draft = self._lookup.draft(at, count)
            right = next((n for n, (a, b) in enumerate(zip(draft, tokens[at:], strict=False)) if a != b), len(draft))
            given += len(others) + 1 + right
            steps += 1
            at += 1 + right
        return given / steps / float(np.interp(sum(others) + 1 + count, list(times), list(times.values())))

    def decide(self, count: int) -> bool:
        """Take ``count`` drafts from now on; return whether that is a change: the next look is then further away."""
        changes = count != self.count
        if changes:
            self.count, self._wait = count, 2 * self._wait
        self._next_decision = len(self._lookup.tokens) + self._wait
        return changes
