"""SIGTERM ends a command as Ctrl-C does, and what was begun is unwound to its end."""

from __future__ import annotations

import signal

import pytest

from minitron import interrupt


def test_a_second_sigterm_does_not_break_the_unwinding() -> None:
    """GNU timeout sends two: to the process, and to its group.

    Here the thread sends them to itself, and has had each when it goes on. One that was sent to the process may reach
    another of its threads, and come when the handler is gone: it ended the test's process (seen, on a busy machine).
    """
    before, unwound = signal.getsignal(signal.SIGTERM), False
    with pytest.raises(KeyboardInterrupt), interrupt.by_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            unwound = True
    assert unwound and signal.getsignal(signal.SIGTERM) is before
