"""Ending a server from outside, through its supervisor or without it."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from minitron.errors import NotDrained, ServerError
from minitron_triton.server import state
from minitron_triton.server.launch import GRACE_S
from minitron_triton.server.state import State

_POLL_S = 0.02
_CLEAN_UP_S = 10.0  # for the supervisor, once the server is at its end
_BEFORE = {
    "failed": "had failed", "killed": "had been killed", "dead": "was dead already: its supervisor was killed",
    "stopped": "had been stopped",
}  # fmt: skip


@dataclass(frozen=True)
class Stopped:
    """How a server ended, in words and as an exit code; ``log`` is None where it went with the server."""

    repository: Path
    how: str
    exit_code: int
    log: Path | None


def stop(server: State) -> Stopped:
    """End the server and remove what is left of it, save its log where it did not end in good order."""
    if server.ended:
        return _stopped(server, _BEFORE[server.phase], 0)
    server.supervisor.send(signal.SIGTERM)
    deadline = time.monotonic() + server.exit_timeout_s + GRACE_S + _CLEAN_UP_S
    while server.alive and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if server.alive:  # it hangs
        server.supervisor.send(signal.SIGKILL)
        server.keep("killed")
    left = state.read(server.folder)
    if left is None:
        return Stopped(server.repository, "drained and stopped", 0, None)
    if left.phase == "stopped":
        return _stopped(left, f"drained and stopped; it had crashed (restarts: {left.restarts})", 0)
    if left.phase == "killed":
        how = f"did not drain within {server.exit_timeout_s} s and was killed"
        return _stopped(left, how, NotDrained.exit_code)
    if not left.ended:  # its supervisor was killed meanwhile
        left.keep("dead")
    return _stopped(left, "died while it drained", ServerError.exit_code)


def _stopped(server: State, how: str, exit_code: int) -> Stopped:
    return Stopped(server.repository, f"{how}; its log: {server.log}", exit_code, server.log)
