"""Commands of ours as child processes, for the commands that compose others: nothing outlives an interrupt.

A child has a session of its own: Ctrl-C comes to the parent alone, which hands it on once and waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from minitron.errors import UsageError

log = logging.getLogger(__name__)

#: ``minitron`` of this very environment, wherever the console script is.
COMMAND = (sys.executable, "-m", "minitron_cli")

#: A child that ends a server needs some; one that takes so long hangs.
_SECONDS_TO_STOP = 120.0


def run(
    *words: str | Path,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``minitron WORDS`` to its end; ``stdout`` and ``stderr`` as subprocess takes them."""
    child = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=stdout, stderr=stderr, text=True, start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        text, errors = child.communicate()
    except KeyboardInterrupt:
        _interrupt(child)
        raise
    return subprocess.CompletedProcess(child.args, child.returncode, text, errors)


def _interrupt(child: Any) -> None:
    with signals_ignored(signal.SIGINT, signal.SIGTERM):
        child.send_signal(signal.SIGINT)
        try:
            child.communicate(timeout=_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            log.error("'minitron %s' did not end within %.0f s and is killed", child.args[3], _SECONDS_TO_STOP)
            child.kill()
            child.communicate()


@contextlib.contextmanager
def only_user_of(folder: Path, what: str) -> Iterator[None]:
    """Refuse to work where another ``what`` works; raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / f".{what}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"another {what} works in {folder}; give this one another --output") from None
    finally:
        os.close(lock)


@contextlib.contextmanager
def signals_ignored(*numbers: int) -> Iterator[None]:
    """Ignore signals, in children too."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
