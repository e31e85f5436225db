"""The processes and shared-memory segments of one server, found by its mark, and their removal.

A killed tritonserver leaves its stub processes behind, which ignore SIGTERM, and their segments in /dev/shm. Every
process of a server carries the server's mark in its environment, and every segment in its name, so that exactly
those are ended and removed (see proc(5) for the files read here).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_trtllm.server.flags import shared_memory_prefix
from minitron_trtllm.server.launch import MARK_VARIABLE

log = logging.getLogger(__name__)

_SHM = Path("/dev/shm")
_SECONDS_TO_VANISH = 5.0


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same number by its start (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with that number; a zombie does not live."""
        try:
            # The name in parentheses may hold anything; behind it come the state and, 19 fields on, the start.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def lives(self) -> bool:
        """Whether it is still there."""
        return Process.of(self.pid) == self

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there and ours."""
        if self.lives():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


def processes(mark: str) -> list[Process]:
    """The living processes of the server with that mark."""
    return [process for process in map(Process.of, _marked(mark)) if process]


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue  # gone meanwhile, or another user's
            if wanted in environment.split(b"\0"):
                yield int(entry.name)


def segments(mark: str) -> list[Path]:
    """The server's shared-memory segments."""
    return sorted(_SHM.glob(shared_memory_prefix(mark) + "*"))


def remove(mark: str) -> int:
    """End what still runs of the server at once, remove its segments, and return the number of processes ended."""
    orphans = processes(mark)
    for process in orphans:
        process.send(signal.SIGKILL)
    deadline = time.monotonic() + _SECONDS_TO_VANISH
    while any(process.lives() for process in orphans) and time.monotonic() < deadline:
        time.sleep(0.02)
    for segment in segments(mark):
        with contextlib.suppress(OSError):
            segment.unlink()
    return len(orphans)
