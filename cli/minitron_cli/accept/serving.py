"""The server of some checks: started when the first of them needs it and ended whatever happens, or running anyway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron import children, recipe
from minitron.errors import MachineError, NotReady, ServerError
from minitron_cli import running
from minitron_cli.accept.evidence import Evidence
from minitron_client.client.endpoint import Endpoint
from minitron_triton.server import state, stopping
from minitron_triton.server.state import State

if TYPE_CHECKING:
    from typing_extensions import Self

_STATE = "servers"
_FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


class FoundServer:
    """A server that runs already, here or elsewhere; a context manager that leaves it alone.

    ``urls``: host and port of its grpc, http and metrics, as far as they are known. ``endpoint``: how its gRPC is
    reached, ``flags``: the same as flags of a command. ``found``: what 'minitron serve' wrote down, where it runs here.
    """

    load_s = 0.0

    def __init__(
        self, urls: Mapping[str, str], endpoint: Endpoint, flags: Sequence[str | Path], found: State | None
    ) -> None:
        self._urls, self._endpoint, self._flags, self._state = urls, endpoint, flags, found

    def urls(self) -> Mapping[str, str]:
        """Where it is."""
        return self._urls

    def endpoint(self) -> Endpoint:
        """How its gRPC is reached."""
        return self._endpoint

    def flags(self) -> Sequence[str | Path]:
        """The same as flags of a command that asks it."""
        return self._flags

    def state(self) -> State:
        """What 'minitron serve' wrote down about it; raises NotReady where it does not run here."""
        if self._state is None:
            raise NotReady(f"the log of {self._endpoint.url} is where it runs: ask there, without --url")
        return self._state

    def end(self) -> str:
        """End it where it is ours, and say how it ended; raises ServerError where that was not in good order."""
        return "it is not ours"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Started(FoundServer):
    """Our own server of ``repository``: started when it is first asked for anything, ended with the context.

    It is a process of its own, as every server that 'minitron serve' starts; what it takes to start it may raise
    ServerError, MachineError. Its log is kept as NAME-server.log among the evidence.
    """

    def __init__(self, evidence: Evidence, repository: Path, recipe_file: Path, name: str) -> None:
        self._evidence, self._repository, self._recipe_file, self._name = evidence, repository, recipe_file, name
        self._states = evidence.folder / _STATE
        self._document: Mapping[str, Any] | None = None

    def urls(self) -> Mapping[str, str]:
        """Where it is; starts it the first time."""
        if self._document is None:
            started = time.monotonic()
            self._document = json.loads(self._serve())
            self.load_s = time.monotonic() - started
        return dict(self._document["urls"])

    def _serve(self) -> str:
        words: list[str | Path] = [self._repository, "--recipe", self._recipe_file, "--state", self._states]
        # The recipe is a file with every layer applied: the environment must not count twice.
        environment = {name: value for name, value in os.environ.items() if not recipe.is_variable(name)}
        done = children.run("serve", *words, *_FREE_PORTS, "--detach", "--json", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, environment=environment)  # fmt: skip
        sys.stderr.write(done.stderr)
        if done.returncode:
            said = [line.removeprefix("minitron: error: ") for line in done.stderr.splitlines() if line.strip()]
            kind = MachineError if done.returncode == MachineError.exit_code else ServerError
            raise kind(said[-1] if said else f"'minitron serve' ended with {done.returncode} and said nothing")
        return str(done.stdout)

    def endpoint(self) -> Endpoint:
        """Without TLS or a key."""
        return Endpoint(self.urls()["grpc"])

    def flags(self) -> Sequence[str | Path]:
        """Where it is, as a flag."""
        return ["--url", self.urls()["grpc"]]

    def state(self) -> State:
        """Its state; starts it where it is not."""
        self.urls()
        return running.ready(self._states, self._repository)

    def end(self) -> str:
        """SIGTERM, and how the server ended; raises ServerError where it had to be killed or ended badly."""
        if self._document is None:
            return "it was not started in this run"
        document, self._document = self._document, None
        try:
            stopped = [stopping.stop(server) for server in state.servers(self._states, self._repository)]
        finally:
            self._keep_log(document)
        how = "; ".join(one.how for one in stopped) or "nothing was left to stop"
        if any(one.exit_code for one in stopped):
            raise ServerError(how)
        return how

    def _keep_log(self, document: Mapping[str, Any]) -> None:
        log = Path(document["log"])
        if log.exists():
            shutil.copyfile(log, self._evidence.folder / f"{self._name}-server.log")

    def __exit__(self, *_: object) -> None:
        if self._document is not None:
            with children.signals_ignored(signal.SIGINT, signal.SIGTERM):
                document, self._document = self._document, None
                self._keep_log(document)
                for server in state.servers(self._states, self._repository):
                    stopping.stop(server)


def end_leftovers(evidence: Evidence) -> None:
    """End the servers that an acceptance left that was killed."""
    for server in state.servers(evidence.folder / _STATE):
        stopping.stop(server)
