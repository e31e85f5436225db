"""``bare_triton`` as a process of its own, with what it noted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Bare:
    """A running ``bare_triton`` process."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._events = folder / "events.jsonl"
        self._words = [sys.executable, str(HERE / "bare_triton.py"), "--events", str(self._events), *words]
        self.port = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*self._words, "--port", str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def events(self, kind: str, request_id: str | None = None) -> list[dict[str, Any]]:
        lines = map(json.loads, self._events.read_text().splitlines())
        return [one for one in lines if one["event"] == kind and request_id in (None, one["id"])]

    def wait_for(self, kind: str, request_id: str) -> None:
        until = time.monotonic() + 20
        while not self.events(kind, request_id):
            assert time.monotonic() < until, f"no {kind!r} of {request_id}"
            time.sleep(0.01)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def prompt(**behaviour: Any) -> str:
    """What makes the process answer so (see ``bare_triton.Behaviour``)."""
    return json.dumps(behaviour)


def words(count: int) -> str:
    """The text of an answer of so many tokens."""
    return "".join(f" w{number}" for number in range(count))
