"""SIGTERM ends a command as Ctrl-C does, and what was begun is unwound to its end."""

from __future__ import annotations

import os
import signal

import pytest

from minitron import interrupt


def test_a_second_sigterm_does_not_break_the_unwinding() -> None:
    """GNU timeout sends two: to the process, and to its group."""
    before, unwound = signal.getsignal(signal.SIGTERM), False
    with pytest.raises(KeyboardInterrupt), interrupt.by_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            unwound = True
    assert unwound and signal.getsignal(signal.SIGTERM) is before
