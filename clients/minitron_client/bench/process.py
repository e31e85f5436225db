"""How a process that measures is set up, so that its own pauses do not pass for the server's latency.

* Python's garbage collector. Going through everything that a process holds takes it milliseconds, up to 24 measured.
  Sending leaves it nothing to find: neither grpc.aio nor our records make cycles, whether a request ends well or not (a
  test holds that).
* Waiting for a CPU. A response wakes two threads one after the other, gRPC's and asyncio's, and each may wait for the
  time slice of whatever runs there. Where the system permits it (root, CAP_SYS_NICE, or a limit for it: ``ulimit -r``)
  the threads run in real time instead (SCHED_FIFO with the lowest priority of that kind, sched(7)). Linux itself keeps
  a share of every CPU from threads in real time, so that a runaway one cannot hold it.
* gRPC's threads. By default gRPC (1.85) reads sockets in the threads of its event engine: five changes of thread for
  each message. Without, the thread that waits for messages reads them itself: one change, and a third less CPU time. A
  gRPC that no longer knows the setting says so on stderr and goes on.
* Late timers. asyncio's own are late by up to a millisecond, a timerfd by a tenth of one (timerfd_create(2); through
  libc, because Python has ``os.timerfd_create`` from 3.13 on).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Iterator

#: Processes that send are started anew, because gRPC does not survive a fork.
SPAWN = multiprocessing.get_context("spawn")
_GRPC_SETTING, _WITHOUT_EVENT_ENGINE = "GRPC_EXPERIMENTS", "-event_engine_client"
_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC, _ABSOLUTE = 1, 0o4000 | 0o2000000, 1


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
        _set_policy(0, os.SCHED_FIFO)
    except PermissionError:
        return "normal"
    os.sched_setscheduler(0, given, priority)
    return "real time"


@contextlib.contextmanager
def _real_time() -> Iterator[None]:
    if scheduling() != "real time":
        yield
        return
    _set_policy_of_all(os.SCHED_FIFO)
    try:
        yield
    finally:
        _set_policy_of_all(os.SCHED_OTHER)


def _set_policy_of_all(policy: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            _set_policy(int(thread), policy)


def _set_policy(thread: int, policy: int) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(os.sched_get_priority_min(policy)))


@contextlib.contextmanager
def lean_grpc() -> Iterator[None]:
    """Processes that are started meanwhile read without the event engine; what the user has set himself stays."""
    if _GRPC_SETTING in os.environ:
        yield
        return
    os.environ[_GRPC_SETTING] = _WITHOUT_EVENT_ENGINE
    try:
        yield
    finally:
        del os.environ[_GRPC_SETTING]


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Pacer:
    """Sleeps until moments of ``time.monotonic_ns``'s clock, for one waiter at a time in one event loop."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.Future[None] | None = None
        self._loop.add_reader(self._file, self._ring)

    async def until(self, time_ns: int) -> None:
        """Return at ``time_ns``, or at once where that is past."""
        if time_ns <= time.monotonic_ns():
            return
        self._due = self._loop.create_future()
        timer = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(*divmod(time_ns, 10**9)))
        if self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        await self._due

    def close(self) -> None:
        """Release the timer."""
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _ring(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            return
        if self._due and not self._due.done():
            self._due.set_result(None)
