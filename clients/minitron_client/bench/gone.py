"""Is the server gone? Then nothing that is sent from here on measures anything.

A request that found nobody, or whose connection ended in the middle, is followed by a question: is the server ready?
It is asked until it says so, or ``GONE_S`` are over. In a closed loop the next request waits for that answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron.errors import NotReady, ServerError, StreamBroken
from minitron_client.bench.record import Record
from minitron_client.bench.wire import AnyWire

GONE = "server gone"
#: A server that is restarted may be back within; one that stalls has its connections and is not asked.
GONE_S = 3.0
_ALARMING = (NotReady.__name__, StreamBroken.__name__)


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

    def __init__(self, wire: AnyWire) -> None:
        self.suspected: Gone | None = None
        self.sure = False
        self._wire, self._seen_ns, self._one_asks = wire, 0, asyncio.Lock()

    async def look_after(self, record: Record) -> None:
        """Return when the server is known to be there, or known to be gone."""
        if record.outcome not in _ALARMING:
            return
        async with self._one_asks:
            if self.sure or record.ended_ns <= self._seen_ns:
                return
            self.suspected = self.suspected or Gone(record.ended_ns, record.index, record.error)
            self.sure = not await self._wire.is_ready(GONE_S)
            if not self.sure:
                self.suspected, self._seen_ns = None, time.monotonic_ns()
