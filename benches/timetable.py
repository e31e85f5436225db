"""When responses are due, each request on a schedule of its own, by the clock that all processes of a machine share.

Used by both servers with a known schedule: the bare one, and the model inside Triton, which finds a copy beside itself.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Stream = TypeVar("Stream")


@dataclass(frozen=True)
class Schedule:
    """A response every ``interval_ns``, at the moments of CLOCK_MONOTONIC whose remainder by it is ``phase_ns``."""

    interval_ns: int
    phase_ns: int = 0

    @classmethod
    def spread(cls, interval_ns: int, streams: int) -> list[Schedule]:
        """Schedules of streams that never want anything sent at the same moment."""
        return [cls(interval_ns, interval_ns * number // streams) for number in range(streams)]

    @classmethod
    def of_prompt(cls, prompt: str) -> Schedule:
        """Read it from the prompt in which a request brings it; any other prompt, such as a probe's, gets 10 ms."""
        return cls(**json.loads(prompt)) if prompt.startswith("{") else cls(10_000_000)

    def prompt(self) -> str:
        """What ``of_prompt`` reads."""
        return json.dumps(vars(self))

    def after(self, now_ns: int) -> int:
        """The first moment of the schedule after ``now_ns``."""
        return now_ns + self.interval_ns - (now_ns - self.phase_ns) % self.interval_ns


class Due(NamedTuple, Generic[Stream]):
    """A response that should be sent now."""

    due_ns: int
    stream: Stream
    is_last: bool


class Timetable(Generic[Stream]):
    """The streams that are being answered, by when each is due next."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Stream, int, int]] = []  # due, number, stream, responses left, interval
        self._added = 0

    @property
    def next_ns(self) -> int | None:
        """When something is due next; None without streams."""
        return self._waiting[0][0] if self._waiting else None

    def add(self, stream: Stream, schedule: Schedule, responses: int, now_ns: int) -> None:
        """Answer ``stream`` with so many responses from now on."""
        self._added += 1
        heapq.heappush(self._waiting, (schedule.after(now_ns), self._added, stream, responses, schedule.interval_ns))

    def take(self, now_ns: int) -> Due[Stream] | None:
        """What is due and has not been taken yet, the longest overdue first; None when there is no more."""
        if not self._waiting or self._waiting[0][0] > now_ns:
            return None
        due_ns, number, stream, left, interval_ns = self._waiting[0]
        if left > 1:
            heapq.heapreplace(self._waiting, (due_ns + interval_ns, number, stream, left - 1, interval_ns))
        else:
            heapq.heappop(self._waiting)
        return Due(due_ns, stream, left <= 1)


def be_punctual() -> None:
    """Let this thread run whenever something is due, before whatever else the machine does; where that is permitted."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
