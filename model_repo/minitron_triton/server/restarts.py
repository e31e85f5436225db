"""How often, and after which pause, a server that crashed is started again."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Crashes of the last ten minutes count; what broke earlier is another story.
WINDOW_S = 600.0


class Restarts:
    """``limit`` restarts within WINDOW_S, after pauses of 1, 2, 4 seconds and so on; ``count`` is that of all."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._recent: list[float] = []
        self.count = 0

    def next_pause_s(self) -> float | None:
        """Count a crash: the seconds to wait before the next start, or None when there are to be no more."""
        now = self._clock()
        self._recent = [then for then in self._recent if now - then < WINDOW_S]
        if len(self._recent) >= self._limit:
            return None
        self._recent.append(now)
        self.count += 1
        return float(2 ** (len(self._recent) - 1))
