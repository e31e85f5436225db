"""``minitron serve`` as the tests of a server's life run it, and what of a server is there.

Processes and segments are counted here by other means than the toolkit's: a process is the server's when its command
line names the server's state folder or its mark, a segment when its name holds the mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOMS, ROOT
from minitron_client.client import Client

FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


class Supervisor:
    """``minitron serve`` in a process of its own, on free ports."""

    def __init__(
        self, repository: Path, state: Path, *flags: str | Path, python: Path | None = None, **environment: str
    ) -> None:
        words = ["serve", repository, *FREE, "--state", state, "--json", *flags]
        rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        self.process = subprocess.Popen(
            [python or sys.executable, "-m", "minitron_cli", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": rooms} | environment,
        )  # fmt: skip
        self.repository, self.state = repository, state
        self.document: dict[str, Any] = {}

    def wait_until_ready(self) -> Supervisor:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("}"):
                self.document = json.loads("".join(lines))
                return self
        raise AssertionError(f"not ready: {self.end()}")

    @property
    def mark(self) -> str:
        return str(self.document["mark"])

    @property
    def url(self) -> str:
        return str(self.document["urls"]["grpc"])

    @property
    def written(self) -> dict[str, Any]:
        """The state as it is on the disk now."""
        return dict(json.loads((self.state / self.mark / "state.json").read_text()))

    def reaches(self, phase: str) -> bool:
        """Wait until the server is in that phase."""
        return within(60, lambda: self.written["phase"] == phase)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        """Wait for its end: exit code and stderr."""
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said


def command_lines(text: str) -> dict[int, str]:
    """Living processes whose command line holds ``text``, this one and its parents' shells apart."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if text in words:
                    found[int(entry.name)] = words
        except OSError:
            continue
    return found


def tritonserver(mark: str) -> int:
    (pid,) = [pid for pid, words in command_lines(mark).items() if "/bin/tritonserver " in words]
    return pid


def stub(mark: str) -> int:
    (pid,) = [pid for pid, words in command_lines(mark).items() if "triton_python_backend_stub" in words]
    return pid


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def only_the_log(state: Path) -> Path:
    """The log of the one server that ended badly: all that is left of it in ``state``, but for what it was."""
    (folder,) = state.iterdir()
    assert sorted(os.listdir(folder)) == ["server.log", "state.json"]
    return folder / "server.log"


def segments(mark: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if mark in name]


def nothing_is_left(mark: str) -> bool:
    return not command_lines(mark) and not segments(mark)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ask(url: str, tokens: int, **options: Any) -> list[str]:
    """The texts that ``echo`` streams."""
    with (
        Client(url, model="echo", deadline_s=30, **options) as client,
        client.stream("hi", max_tokens=tokens) as stream,
    ):
        return [chunk.text for chunk in stream if chunk.text]
