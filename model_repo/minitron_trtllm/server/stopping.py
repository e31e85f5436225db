"""Ending a server from outside, through its supervisor or without it."""

from __future__ import annotations

import signal
import time

from minitron_trtllm.server.launch import UNLOAD_S
from minitron_trtllm.server.state import State

_POLL_S = 0.05
_GRACE_S = 10.0  # for the supervisor to clean up


def stop(server: State) -> str:
    """End the server and remove all that is left of it; returns in words how it ended.

    A living supervisor drains. Where it was killed, what it left is removed.
    """
    if server.alive:
        server.supervisor.send(signal.SIGTERM)
        deadline = time.monotonic() + server.exit_timeout_s + UNLOAD_S + _GRACE_S
        while server.alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not server.alive and not server.folder.exists():
            return "drained and stopped"
        server.supervisor.send(signal.SIGKILL)
        server.clear()
        return "did not drain in time, killed"
    ended = server.clear()
    return f"was dead already; removed what it had left ({ended} processes)"
