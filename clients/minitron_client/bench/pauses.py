"""What would pass for the server's latency while requests are measured, held back: two kinds of pauses of our own.

* Python's garbage collector. Going through everything that a process holds takes it milliseconds, up to 24 measured.
  Sending leaves it nothing to find: neither grpc.aio nor our records make cycles, whether a request ends well or not (a
  test holds that).
* Waiting for a CPU. A response wakes two threads one after the other, gRPC's and asyncio's, and each may wait for the
  time slice of whatever runs there. Where the system permits it (root, CAP_SYS_NICE, or a limit for it: ``ulimit -r``)
  the threads run in real time instead (SCHED_FIFO with the lowest priority of that kind, sched(7)). Linux itself keeps
  a share of every CPU from threads in real time, so that a runaway one cannot hold it.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def no_pauses() -> Iterator[None]:
    """Collect before, and not again until the end; this process's threads, those to come too, run in real time."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with _real_time():
            yield
    finally:
        if collects:
            gc.enable()


def scheduling() -> str:
    """How threads that measure are scheduled here: ``real time``, ``normal``, or ``as given`` by the user (chrt)."""
    given, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    if given != os.SCHED_OTHER:
        return "as given"
    try:
        _set(0, os.SCHED_FIFO)
    except PermissionError:
        return "normal"
    os.sched_setscheduler(0, given, priority)
    return "real time"


@contextlib.contextmanager
def _real_time() -> Iterator[None]:
    if scheduling() != "real time":
        yield
        return
    _set_all(os.SCHED_FIFO)
    try:
        yield
    finally:
        _set_all(os.SCHED_OTHER)


def _set_all(policy: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            _set(int(thread), policy)


def _set(thread: int, policy: int) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(os.sched_get_priority_min(policy)))
