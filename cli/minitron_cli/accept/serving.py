"""A server for some steps of an acceptance: started when the first of them needs it, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron import children
from minitron_cli.accept.evidence import Evidence, StepFailed

_STATE = "servers"
_FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


class Serving:
    """The server of ``repository``; a context manager. ``state``: what its commands take as --state.

    Its log is kept as NAME-server.log among the evidence.
    """

    def __init__(self, evidence: Evidence, repository: Path, recipe_file: Path, name: str) -> None:
        self._evidence, self._repository, self._recipe_file, self._name = evidence, repository, recipe_file, name
        self.state = evidence.folder / _STATE
        self.load_s = 0.0
        self._document: Mapping[str, Any] | None = None

    def urls(self) -> dict[str, str]:
        """Addresses of grpc, http and metrics; starts the server the first time. Raises StepFailed."""
        if self._document is None:
            started = time.monotonic()
            text = self._evidence.run(self._name, "serve", self._repository, "--recipe", self._recipe_file, "--detach",
                                      *_FREE_PORTS, "--state", self.state, "--json")  # fmt: skip
            self.load_s = time.monotonic() - started
            self._document = json.loads(text)
        return dict(self._document["urls"])

    def end(self) -> str:
        """SIGTERM, and how the server ended; raises StepFailed where it had to be killed or ended badly."""
        if self._document is None:
            return "it was not started in this run"
        document, self._document = self._document, None
        try:
            told = json.loads(self._evidence.run(self._name, "stop", self._repository, "--state", self.state, "--json"))
        finally:
            self._keep_log(document)
        return "; ".join(str(one["how"]) for one in told) or "nothing was left to stop"

    def _keep_log(self, document: Mapping[str, Any]) -> None:
        log = Path(document["log"])
        if log.exists():
            shutil.copyfile(log, self._evidence.folder / f"{self._name}-server.log")

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self._document is not None:
            with children.deaf_to(signal.SIGINT, signal.SIGTERM):
                self._keep_log(self._document)
                self._stop()
            self._document = None

    def _stop(self) -> None:
        with contextlib.suppress(StepFailed):  # judged lines stand; that it had to be killed is in the step's log
            self._evidence.run(self._name, "stop", self._repository, "--state", self.state)


def end_leftovers(evidence: Evidence) -> None:
    """End the servers that an acceptance left that was killed; raises StepFailed."""
    if (evidence.folder / _STATE).exists():
        evidence.run("serve", "stop", "--all", "--state", evidence.folder / _STATE)
