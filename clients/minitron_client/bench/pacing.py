"""Waking up on time: asyncio's own timers are late by up to a millisecond, a timerfd by a tenth of one.

Linux only, through libc, because Python has ``os.timerfd_create`` from 3.13 on. Source: timerfd_create(2).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time

_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC, _ABSOLUTE = 1, 0o4000 | 0o2000000, 1


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


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
        setting = _Setting(_Time(0, 0), _Time(*divmod(time_ns, 10**9)))
        if self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(setting), None):
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
