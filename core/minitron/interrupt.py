"""Ending on a signal as on Ctrl-C: what was begun is unwound, not dropped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block; without effect in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
