"""What can go wrong while requests are sent: the server is gone, or takes more than it can finish, or stalls.

Gone: a request that found nobody, or whose connection ended in the middle, is followed by a question: is the server
ready? It is asked until it says so, or ``GONE_S`` are over; nothing that is sent after that measures anything. In a
closed loop the next request waits for that answer.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from minitron.errors import NotReady, ServerError, StreamBroken
from minitron_client.bench.record import Record
from minitron_client.bench.sender import Sender

GONE = "server gone"
#: A server that is restarted may be back within; one that stalls has its connections and is not asked.
GONE_S = 3.0
_ALARMING = (NotReady.__name__, StreamBroken.__name__)
_RISE_SECONDS, _RISE = 15, 2.0
_SHORTEST_STALL_NS = 500_000_000


@dataclass(frozen=True)
class Gone:
    """``since_ns``: when the first request ended that found nobody; ``index``: which that was; ``error``: its words."""

    since_ns: int
    index: int
    error: str

    def document(self, start_ns: int) -> dict[str, Any]:
        """JSON values, the time in s after ``start_ns``."""
        return {"at_s": (self.since_ns - start_ns) / 1e9, "request": self.index, "error": self.error}


def failure(found: Mapping[str, Any]) -> ServerError:
    """The error that a command ends with, of a result's ``server_gone``."""
    return ServerError(
        f"the server is gone since {found['at_s']:.1f} s after the start, request {found['request']} "
        f"({found['error']}); what was measured is kept: see the server's log, and start it again"
    )


class GoneWatch:
    """Looks after requests of one event loop. ``suspected``: nobody was there, and has not been seen since; ``sure``:
    that has been so for long enough.
    """

    def __init__(self, sender: Sender) -> None:
        self.suspected: Gone | None = None
        self.sure = False
        self._sender, self._seen_ns, self._one_asks = sender, 0, asyncio.Lock()

    async def look_after(self, record: Record) -> None:
        """Return when the server is known to be there, or known to be gone."""
        if record.outcome not in _ALARMING:
            return
        async with self._one_asks:
            if self.sure or record.ended_ns <= self._seen_ns:
                return
            self.suspected = self.suspected or Gone(record.ended_ns, record.index, record.error)
            self.sure = not await self._sender.is_ready(GONE_S)
            if not self.sure:
                self.suspected, self._seen_ns = None, time.monotonic_ns()


class SaturationWatch:
    """Is the server taking more than it can finish? Then requests in flight and TTFT both rise without end.

    Fed once a second; ``saturated`` when over the last 15 s both rose steadily and at least doubled.
    """

    def __init__(self) -> None:
        self._in_flight: deque[float] = deque(maxlen=_RISE_SECONDS)
        self._ttft_ms: deque[float] = deque(maxlen=_RISE_SECONDS)

    def feed(self, in_flight: int, ttft_ms: list[float]) -> None:
        """What one second brought; a second without a first token repeats the last TTFT."""
        last = self._ttft_ms[-1] if self._ttft_ms else 0.0
        self._in_flight.append(in_flight)
        self._ttft_ms.append(median(ttft_ms) if ttft_ms else last)

    @property
    def saturated(self) -> bool:
        """Whether the run should stop."""
        return len(self._in_flight) == _RISE_SECONDS and all(map(_rises, (self._in_flight, self._ttft_ms)))


def _rises(values: deque[float]) -> bool:
    """A line through the values at least doubles from its first to its last point, and explains most of them."""
    seconds = np.arange(len(values))
    slope, start = np.polyfit(seconds, list(values), 1)
    first, last = max(start, 1e-9), start + slope * (len(values) - 1)
    return bool(slope > 0 and last >= _RISE * first and np.corrcoef(seconds, list(values))[0, 1] > 0.8)


def stalls(records: Iterable[Record], itl_p99_ms: float | None, start_ns: int) -> list[dict[str, Any]]:
    """Gaps between responses of any request, of half a second or ten times the usual ITL, in which requests waited.

    Each with its start in s after ``start_ns``, its length in s, and how many requests waited through all of it.
    """
    begun, ended, moments = array("q"), array("q"), array("q")
    for record in records:
        begun.append(record.intended_ns)
        ended.append(record.ended_ns)
        moments.extend(time_ns for time_ns, _ in record.responses)
    if not begun:
        return []
    begins, ends = np.sort(np.array(begun)), np.sort(np.array(ended))
    times = np.sort(np.append(np.array(moments, np.int64), begins[0]))
    least = max(_SHORTEST_STALL_NS, 10 * (itl_p99_ms or 0) * 1e6)
    found = []
    for index in np.flatnonzero(np.diff(times) >= least):
        low, high = int(times[index]), int(times[index + 1])
        # waiting when the gap began (or soon after) and still waiting when it ended
        waiting = int(np.searchsorted(begins, low + least // 2, "right") - np.searchsorted(ends, high, "left"))
        if waiting > 0:
            found.append({"at_s": (low - start_ns) / 1e9, "seconds": (high - low) / 1e9, "waiting": waiting})
    return found
