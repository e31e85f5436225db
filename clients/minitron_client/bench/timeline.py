"""What the records of a run show over time: stalls, when nothing came although requests were waiting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minitron_client.bench.record import Record

_SHORTEST_NS = 500_000_000


def stalls(records: Iterable[Record], itl_p99_ms: float | None, start_ns: int) -> list[dict[str, Any]]:
    """Gaps between responses of any request, of half a second or ten times the usual ITL, in which requests waited.

    Each with its start in s after ``start_ns``, its length in s, and how many requests waited through all of it.
    """
    kept = [(one.intended_ns, one.ended_ns, [time_ns for time_ns, _ in one.responses]) for one in records]
    if not kept:
        return []
    begun = np.sort([begin for begin, _, _ in kept])
    ended = np.sort([end for _, end, _ in kept])
    moments = np.sort(np.array([time_ns for _, _, times in kept for time_ns in times] + [begun[0]], np.int64))
    least = max(_SHORTEST_NS, 10 * (itl_p99_ms or 0) * 1e6)
    found = []
    for index in np.flatnonzero(np.diff(moments) >= least):
        low, high = int(moments[index]), int(moments[index + 1])
        # waiting when the gap began (or soon after) and still waiting when it ended
        waiting = int(np.searchsorted(begun, low + least // 2, "right") - np.searchsorted(ended, high, "left"))
        if waiting > 0:
            found.append({"at_s": (low - start_ns) / 1e9, "seconds": (high - low) / 1e9, "waiting": waiting})
    return found
