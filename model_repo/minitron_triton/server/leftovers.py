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

from minitron_triton.server.flags import shared_memory_prefix
from minitron_triton.server.launch import MARK_VARIABLE

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")
_STUB = "triton_python_backend_stub"
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
            fields = _fields(Path(f"/proc/{pid}"))
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


def stubs(mark: str) -> dict[str, Process]:
    """The living processes of its Python models, by the name of the model's instance (``echo_0_0``)."""
    words = {process: _command_line(process.pid) for process in processes(mark)}
    return {each[8]: process for process, each in words.items() if len(each) > 8 and Path(each[0]).name == _STUB}


def dead_children(pid: int) -> list[int]:
    """Children of a process that are dead, and that it has not waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                fields = _fields(entry)
                if fields[0] == "Z" and int(fields[1]) == pid:
                    found.append(int(entry.name))
    return found


def _fields(process: Path) -> list[str]:
    """What proc(5) says in stat behind the name, which stands in parentheses and may hold anything: state, parent …"""
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


def at_work(mark: str) -> bool | None:
    """Whether a thread of its tritonserver runs or waits for a processor; None where no tritonserver can be seen."""
    threads = _threads(mark)
    return any(_state(thread) in "RD" for thread in threads) if threads else None


def waits_for_a_process(mark: str) -> bool:
    """Whether a thread of its tritonserver waits for the end of another process, as far as the kernel tells."""
    return any(_kernel_function(thread) == "do_wait" for thread in _threads(mark))


def _threads(mark: str) -> list[Path]:
    servers = [one.pid for one in processes(mark) if Path(_command_line(one.pid)[0]).name == "tritonserver"]
    return [thread for pid in servers for thread in Path(f"/proc/{pid}/task").glob("*")]


def _kernel_function(thread: Path) -> str:
    """Where in the kernel a thread sleeps (proc(5), wchan); empty where it does not, or where that is secret."""
    try:
        return (thread / "wchan").read_text()
    except OSError:
        return ""


def _state(thread: Path) -> str:
    try:
        return _fields(thread)[0]
    except OSError:
        return "X"


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return [""]


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
    """The server's shared-memory segments, and its link there (see ``bundled``)."""
    return sorted(SHM.glob(shared_memory_prefix(mark) + "*"))


def remove(mark: str) -> int:
    """End what still runs of the server at once, remove its segments, and return the number of processes ended."""
    ended: set[Process] = set()
    deadline = time.monotonic() + _SECONDS_TO_VANISH
    # Again until there are none: one that is killed may have begun another just before.
    while (orphans := processes(mark)) and time.monotonic() < deadline:
        for process in orphans:
            process.send(signal.SIGKILL)
        ended.update(orphans)
        time.sleep(0.01)
    for segment in segments(mark):
        with contextlib.suppress(OSError):
            segment.unlink()
    return len(ended)
