"""Which texts are computed together: those that begin alike, so that the work is least, and as many as memory takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from minitron_build.evaluate.tasks.prefixes import common_length

Text = tuple[int, ...]

#: Tokens whose keys and values are held at once: 2.1 GB in float32 at the 4B shape.
_MOST_TOKENS = 8192
_MOST_TEXTS = 32


@dataclass(frozen=True)
class Scored:
    """A text of which the last ``wanted`` tokens' logits are needed; ``number`` is the caller's."""

    text: Text
    wanted: int
    number: int = 0

    @property
    def shareable(self) -> int:
        """Tokens that may be of a prefix."""
        return len(self.text) - self.wanted


def groups(texts: Sequence[Scored]) -> Iterator[tuple[Text, list[Scored]]]:
    """Groups with their common prefix, which may be empty: those for which the fewest tokens are computed.

    A group of n that share p tokens saves (n - 1) p. Texts that share most are neighbours in the order of their ids,
    and the best cut of that order into groups is found from its front on.
    """
    order = sorted(texts, key=lambda one: one.text)
    alike = [common_length([one.text, other.text]) for one, other in pairwise(order)]
    saved: list[int] = [0]
    cuts: list[tuple[int, int]] = []  # for each end: where its last group begins, and what that shares
    for end in range(1, len(order) + 1):
        best = (saved[end - 1], end - 1, 0)
        shared = order[end - 1].shareable
        for begin in range(end - 2, -1, -1):
            shared = min(shared, order[begin].shareable, alike[begin])
            if not shared:
                break
            best = max(best, (saved[begin] + (end - 1 - begin) * shared, begin, shared), key=lambda way: way[0])
        saved.append(best[0])
        cuts.append(best[1:])
    found, end = [], len(order)
    while end:
        begin, shared = cuts[end - 1]
        found.append((order[begin].text[:shared], order[begin:end]))
        end = begin
    yield from reversed(found)


def several(texts: Sequence[Scored], more: int) -> Iterator[list[Scored]]:
    """Batches in their order, of texts that each need place for ``more`` tokens than their own; at least one each."""
    batch: list[Scored] = []
    for one in sorted(texts, key=lambda one: len(one.text)):
        if batch and (len(batch) == _MOST_TEXTS or (len(batch) + 1) * (len(one.text) + more) > _MOST_TOKENS):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
