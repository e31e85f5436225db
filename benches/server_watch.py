"""A server seen from outside while it works and after its end: processes, memory, open files, metrics, traces.

Processes are found by the server's mark in their environment (``leftovers``); what is left of a server that has ended
is counted by other means than the toolkit's own: its mark in command lines and in the names in /dev/shm.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from minitron.prometheus import Metrics
from minitron_triton.server import leftovers

_CRASHED = b"Signal ("  # what tritonserver writes first when a signal ends it; it may then hang instead of ending
_ACTIVE = ("nv_trt_llm_request_metrics", {"request_type": "active"})
_PENDING = "nv_inference_pending_request_count"


@dataclass(frozen=True)
class Footprint:
    """One process at one moment: bytes that it shares with nobody (proc(5), smaps_rollup), and its open files."""

    private_bytes: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Of a process of this user's; raises OSError where it is gone."""
        private = 0
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                private += int(line.split()[1]) * 1024
        return cls(private, len(list(Path(f"/proc/{pid}/fd").iterdir())))


class Watched:
    """A running server by its state document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.mark: str = document["mark"]
        self.folder, self.log = Path(document["folder"]), Path(document["log"])
        self._metrics: str = document["urls"]["metrics"]
        self.processes = {name: process.pid for name, process in leftovers.stubs(self.mark).items()}
        stubs = set(self.processes.values())
        servers = [one.pid for one in leftovers.processes(self.mark) if one.pid not in stubs]
        self.processes["tritonserver"] = next(pid for pid in servers if psutil.Process(pid).name() == "tritonserver")

    def footprints(self) -> dict[str, Footprint]:
        """Of each process, by the name of the model's instance, or ``tritonserver``."""
        return {name: Footprint.of(pid) for name, pid in self.processes.items()}

    def crash(self) -> str | None:
        """What became of the server, or None while it is the one that was found in the beginning."""
        if _CRASHED in self.log.read_bytes():
            return "tritonserver was ended by a signal: " + self._words_of_crash()
        gone = [name for name, pid in self.processes.items() if not _lives(pid)]
        if gone:
            return f"the process of {', '.join(gone)} is gone"
        restarts = json.loads((self.folder / "state.json").read_text(encoding="utf-8")).get("restarts", 0)
        return f"the supervisor had to start it again {restarts} times" if restarts else None

    def _words_of_crash(self) -> str:
        log = self.log.read_bytes()
        lines = log[log.index(_CRASHED) :].decode("utf-8", "replace").splitlines()
        return " | ".join(line.strip() for line in lines[:6])

    def requests(self) -> tuple[float, float]:
        """Requests that the engine has, and that wait in Triton, as the server counts them."""
        now = Metrics.read(self._metrics)
        return now.sum(_ACTIVE[0], **_ACTIVE[1]) or 0.0, now.sum(_PENDING) or 0.0


@dataclass(frozen=True)
class Growth:
    """A process in an early and a late window of the same load: medians of what it held, and what that grew."""

    name: str
    early: Footprint
    late: Footprint

    @property
    def private_bytes(self) -> int:
        """Grown private memory."""
        return self.late.private_bytes - self.early.private_bytes

    @property
    def files(self) -> int:
        """Grown number of open files."""
        return self.late.files - self.early.files

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "process": self.name, "early": vars(self.early), "late": vars(self.late),
            "growth": {"private_bytes": self.private_bytes, "files": self.files},
        }  # fmt: skip


def growths(samples: Sequence[dict[str, Footprint]]) -> list[Growth]:
    """The second quarter of samples taken in even steps beside the last; the first is warm-up."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    return [Growth(name, _median(early, name), _median(late, name)) for name in samples[0]]


def _median(samples: Sequence[dict[str, Footprint]], name: str) -> Footprint:
    found = [sample[name] for sample in samples]
    return Footprint(
        int(statistics.median(one.private_bytes for one in found)), int(statistics.median(one.files for one in found))
    )


@dataclass(frozen=True)
class End:
    """How a server ended: ``seconds`` from the last stream's end to that of ``minitron serve``, and what was left."""

    seconds: float
    exit_code: int
    left: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"seconds": round(self.seconds, 3), "exit_code": self.exit_code, "left": list(self.left)}


def end_of(server: Watched, process: subprocess.Popen[str], last_stream: float, timeout_s: float = 180) -> End:
    """Wait for a ``minitron serve`` that was asked to end; ``last_stream``: when its last stream did (perf_counter).

    One that does not end in time is killed.
    """
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return End(time.perf_counter() - last_stream, process.returncode, tuple(traces(server.mark, server.folder)))


def traces(mark: str, folder: Path) -> list[str]:
    """What is there of a server: processes, shared memory, its folder."""
    found = [f"/dev/shm/{entry.name}" for entry in Path("/dev/shm").iterdir() if mark in entry.name]
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(mark in word for word in words):
            found.append(f"process {process.pid}: {words[0]}")
    return found + ([str(folder)] if folder.exists() else [])


def _lives(pid: int) -> bool:
    return leftovers.Process.of(pid) is not None
