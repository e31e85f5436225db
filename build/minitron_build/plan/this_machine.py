"""What a plan for target cpu needs to know about this machine: its memory and its read bandwidth."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import numpy.typing as npt

from minitron.machine import memory
from minitron_build.plan.roofline import Machine

_SECONDS = 1.0
_BYTES_PER_THREAD = 128 << 20


def capacity_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's where that is less."""
    return memory.limit_bytes()


def roofline_machine(bandwidth: float | None = None) -> Machine:
    """This machine's bandwidth in bytes/s (measured unless given); its arithmetic peak is not known."""
    return Machine(measure_bandwidth() if bandwidth is None else bandwidth, None)


def measure_bandwidth(seconds: float = _SECONDS) -> float:
    """Read bandwidth in bytes/s: every core sums an array of its own, larger than its share of the cache."""
    arrays = [np.ones(_BYTES_PER_THREAD // 8, np.int64) for _ in range(len(os.sched_getaffinity(0)))]
    passes = [0] * len(arrays)
    started = time.perf_counter()
    threads = [
        threading.Thread(target=_read_until, args=(started + seconds, array, passes, i))
        for i, array in enumerate(arrays)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(passes) * _BYTES_PER_THREAD / (time.perf_counter() - started)


def _read_until(end: float, array: npt.NDArray[np.int64], passes: list[int], index: int) -> None:
    while passes[index] == 0 or time.perf_counter() < end:
        array.sum()
        passes[index] += 1
