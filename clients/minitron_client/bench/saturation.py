"""Is the server taking more than it can finish? Then requests in flight and TTFT both rise without end."""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

_SECONDS = 15
_GROWTH = 2.0


class SaturationWatch:
    """Fed once a second; ``saturated`` when over the last 15 s both rose steadily and at least doubled."""

    def __init__(self) -> None:
        self._in_flight: deque[float] = deque(maxlen=_SECONDS)
        self._ttft_ms: deque[float] = deque(maxlen=_SECONDS)

    def feed(self, in_flight: int, ttft_ms: list[float]) -> None:
        """What one second brought; a second without a first token repeats the last TTFT."""
        last = self._ttft_ms[-1] if self._ttft_ms else 0.0
        self._in_flight.append(in_flight)
        self._ttft_ms.append(median(ttft_ms) if ttft_ms else last)

    @property
    def saturated(self) -> bool:
        """Whether the run should stop."""
        return len(self._in_flight) == _SECONDS and all(map(_rises, (self._in_flight, self._ttft_ms)))


def _rises(values: deque[float]) -> bool:
    """A line through the values at least doubles from its first to its last point, and explains most of them."""
    seconds = np.arange(len(values))
    slope, start = np.polyfit(seconds, list(values), 1)
    first, last = max(start, 1e-9), start + slope * (len(values) - 1)
    return bool(slope > 0 and last >= _GROWTH * first and np.corrcoef(seconds, list(values))[0, 1] > 0.8)
