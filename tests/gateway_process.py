"""``minitron gateway`` in a process of its own, and HTTP with Python's own client: no code of the gateway's."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import ROOMS, ROOT


class Gateway:
    """A running gateway."""

    def __init__(self, *flags: str | Path, log: Path | None = None) -> None:
        rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        words = ["gateway", "--listen", "127.0.0.1:0", "--json", "--wait", "60", *flags]
        self._log = log.open("w") if log else subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minitron_cli", *map(str, words)],
            stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | {"PYTHONPATH": rooms},
        )  # fmt: skip
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line.startswith("}"):
                break
        if not text:
            raise AssertionError(f"the gateway did not start: {self.process.communicate()[1]}")
        self.document = json.loads(text)
        self.address = self.document["url"].split("//")[1].removesuffix("/v1")

    def connect(self, timeout_s: float = 120) -> http.client.HTTPConnection:
        if self.document["url"].startswith("https"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return http.client.HTTPSConnection(self.address, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(self.address, timeout=timeout_s)

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            raw = answer.read()
        return answer.status, json.loads(raw) if answer.getheader("content-type") == "application/json" else raw

    def ask(self, path: str, body: Any, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        """A whole answer: status, document, headers."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

    def complete(self, prompt: Any, **options: Any) -> Any:
        """The document of ``/v1/completions``, which must be one."""
        status, document, _ = self.ask("/v1/completions", {"model": "minitron", "prompt": prompt, **options})
        assert status == 200, document
        return document

    def refusal(self, prompt: Any, **options: Any) -> tuple[int, str]:
        status, document, _ = self.ask("/v1/completions", {"model": "minitron", "prompt": prompt, **options})
        assert set(document) == {"error"}, document
        return status, document["error"]["message"]

    @contextlib.contextmanager
    def stream(self, prompt: Any, **options: Any) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a stream (name, document); leaving closes the connection."""
        connection = self.connect()
        body = {"model": "minitron", "prompt": prompt, "stream": True, **options}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        try:
            assert answer.status == 200, answer.read()
            yield events(answer)
        finally:
            answer.close()
            connection.close()

    def texts(self, prompt: Any, **options: Any) -> list[str]:
        """The texts of a stream of one choice."""
        with self.stream(prompt, **options) as stream:
            return [one["choices"][0]["text"] for name, one in stream if one["choices"] and not name]

    def metric(self, line: str) -> float:
        """The value of a line of the page; 0 where it is not there."""
        status, page = self.get("/metrics")
        assert status == 200
        found = [row for row in page.decode().splitlines() if row.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> tuple[int, str]:
        """Ask it to stop and wait: exit code and stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said or ""


def events(answer: Any) -> Iterator[tuple[str, Any]]:
    """Server-sent events up to [DONE]; a stream without it ends with an AssertionError unless an error was told."""
    name, failed = "", False
    for line in answer:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text == "data: [DONE]":
            assert not failed
            return
        elif text.startswith("data: "):
            failed = failed or name == "error"
            yield name, json.loads(text.removeprefix("data: "))
            name = ""
    assert failed, "the stream ended without [DONE]"


def within(seconds: float, condition: Any) -> bool:
    """Whether a condition came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
