"""The rounds of ``bench_cpu``: which sides are loaded together, in which order, and what was measured of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from cpu_workload import Workload


@dataclass(frozen=True)
class Loadable:
    """A side before it is loaded, and the memory that it will take."""

    name: str
    load: Callable[[], AbstractContextManager[Any]]
    needed_bytes: int


@dataclass
class Measured:
    """``rounds``: side → figure → value in each; ``load_s`` of each time that a side was loaded; ``memory_bytes``."""

    rounds: list[dict[str, dict[str, float]]]
    load_s: dict[str, list[float]] = field(default_factory=dict)
    memory_bytes: dict[str, dict[str, int]] = field(default_factory=dict)


def run(groups: Sequence[list[Loadable]], workload: Workload, rounds: int) -> Measured:
    """Load, warm and measure all sides in so many rounds."""
    names = [side.name for group in groups for side in group]
    measured = Measured([{} for _ in range(rounds)], {name: [] for name in names}, {name: {} for name in names})
    for group, numbers in turns(groups, rounds):
        with ExitStack() as stack:
            loaded = [stack.enter_context(side.load()) for side in group]
            for side in loaded:
                workload.warm(side, numbers[0])
                measured.load_s[side.name].append(side.load_s)
            for number in numbers:
                for side in sorted(loaded, key=lambda one: names.index(one.name), reverse=bool(number % 2)):
                    found = measured.rounds[number][side.name] = workload.measure(side, number)
                    print(f"round {number + 1}, {side.name}: {json.dumps(found)}", file=sys.stderr, flush=True)
            for side in loaded:
                before = measured.memory_bytes[side.name]
                found = side.memory.bytes()
                measured.memory_bytes[side.name] = {key: max(found[key], before.get(key, 0)) for key in found}
    return measured


def groups(sides: Sequence[Loadable], available: int) -> list[list[Loadable]]:
    """Sides that are loaded together, in their order: a new group where the next does not fit."""
    found: list[list[Loadable]] = [[]]
    for side in sides:
        if found[-1] and sum(one.needed_bytes for one in found[-1]) + side.needed_bytes > available:
            found.append([])
        found[-1].append(side)
    return found


def turns(groups: Sequence[list[Loadable]], rounds: int) -> Iterator[tuple[list[Loadable], range]]:
    """What is loaded together, in which order, for which rounds.

    One group twice, in the opposite order for the second half; several in each round, in the opposite order each time.
    """
    if len(groups) == 1:
        middle = -(-rounds // 2)
        halves = ((groups[0], range(middle)), (groups[0][::-1], range(middle, rounds)))
        yield from ((group, numbers) for group, numbers in halves if numbers)
        return
    for number in range(rounds):
        turn = -1 if number % 2 else 1
        for group in groups[::turn]:
            yield group[::turn], range(number, number + 1)
