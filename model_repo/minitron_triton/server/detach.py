"""Leaving the supervisor in the background once the server is ready."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from minitron_triton.server.supervisor import hear_stop_signals

_READY = b"."


def fork() -> Callable[[Path], None]:
    """Go on in a child with a session of its own; the parent never returns from here. Call it with stop signals held.

    The parent shows the child's output until the child calls what this returns (with the file for its further
    output), and exits with 0 then; or, should the child end first, with the child's exit code.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os._exit(_wait(child, ready))
    os.close(ready)
    os.setsid()

    def let_go(log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        nothing, further = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(nothing, 0)
        os.dup2(further, 1)
        os.dup2(further, 2)
        os.write(tell, _READY)
        for descriptor in (nothing, further, tell):
            os.close(descriptor)

    return let_go


def _wait(child: int, ready: int) -> int:
    # Ctrl-C here concerns the child, which is out of the terminal's reach: hand it on, and see the child to its end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(child, signal.SIGTERM))
    hear_stop_signals()
    if os.read(ready, 1) == _READY:
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
