"""How far the process is behind, and so how long a stream's text should be gathered before it is sent.

Sending costs the same for one token as for several. So a stream sends every token as it comes while the event loop is
on time, and gathers what comes within a moment as soon as the loop is late: that takes off just the work that is too
much. Late is measured at a timer.
"""

from __future__ import annotations

import asyncio
import time

_TICK_S = 0.02
_ON_TIME_S = 0.004
_MOST_S = 0.08
_GAIN = 4.0


class Pace:
    """Called, it gives the seconds to gather; 0 while the loop is on time. To be made in the loop."""

    def __init__(self) -> None:
        self._late_s = 0.0
        self._task = asyncio.create_task(self._watch())

    def __call__(self) -> float:
        return 0.0 if self._late_s < _ON_TIME_S else min(_MOST_S, _GAIN * self._late_s)

    def stop(self) -> None:
        """Measure no more."""
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            # Up at once, down slowly: a loop that swings would send in bursts.
            self._late_s = max(time.perf_counter() - due, 0.9 * self._late_s)
