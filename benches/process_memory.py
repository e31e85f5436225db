"""Memory of a process and all below it, and its peaks while something runs: what the sides of ``bench_cpu`` take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

#: While it loads, memory comes and goes within a second; later a look a second costs nobody anything.
LOADING_S, ASKING_S = 0.2, 1.0


class MemoryWatch:
    """Bytes that a process and its descendants took at most, since it was made, of what was looked at.

    ``private`` is anonymous memory, resident at one moment, of all of them together: the kernel keeps no peak of it, so
    it is looked at. ``peak`` is the sum of each one's own peak of all resident memory, mapped files included, so that
    what two of them map counts twice (proc(5), status: RssAnon, VmHWM). With ``each_page_once`` it is what all of them
    had at one moment, each page once (proc(5), smaps_rollup: Pss), a look at which stops a process of 4 GB for 0.2 s.
    """

    def __init__(self, pid: int, *, each_page_once: bool = False) -> None:
        self._root, self._each_page_once = pid, each_page_once
        self.private = self.peak = 0

    def measure(self) -> None:
        """Measure now."""
        try:
            every = [self._root, *(child.pid for child in psutil.Process(self._root).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        found = [values for pid in every if (values := _status(pid))]
        self.private = max(self.private, sum(values["RssAnon"] for values in found))
        each = map(_proportional, every) if self._each_page_once else (values["VmHWM"] for values in found)
        self.peak = max(self.peak, sum(each))

    @contextmanager
    def watching(self, every_s: float) -> Iterator[None]:
        """Look so often, and at the end."""
        ended = threading.Event()

        def keep_looking() -> None:
            while not ended.wait(every_s):
                self.measure()

        thread = threading.Thread(target=keep_looking, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.measure()

    def bytes(self) -> dict[str, int]:
        """What was found so far."""
        return {"private": self.private, "peak": self.peak}


def _status(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM in bytes; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {key: values[key] for key in ("RssAnon", "VmHWM")} if "RssAnon" in values else {}


def _proportional(pid: int) -> int:
    """Pss in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
