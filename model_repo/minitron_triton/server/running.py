"""One start of a tritonserver: its process, those of its Python models, its part of the log, and when it is ready."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from minitron.errors import MinitronError, ServerError
from minitron_triton.server import leftovers, readiness
from minitron_triton.server.launch import RESTARTS_VARIABLE, Launch, Options, Served
from minitron_triton.server.leftovers import Process
from minitron_triton.server.loading import Packing, Progress
from minitron_triton.server.server_log import ServerLog

log = logging.getLogger(__name__)

_POLL_S = 0.1
_LOOK_S = 1.0  # between two looks at a starting server's processes
_LAST_WORDS_S = 5.0  # for tritonserver to say itself that a model's process died
_LOST_S = 5.0  # for a process that tritonserver waits for to end, while a model is loaded
_BACKTRACE_S = 5.0  # for tritonserver to write it; its handler of signals may hang over it
_PR_SET_PDEATHSIG = 1
#: What kills a program that goes wrong; SIGKILL is not among them: somebody, or a machine without memory, meant it.
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class Crashed(ServerError):
    """tritonserver died of a signal before it was ready, or lost the process of a model: another start may do better.

    Neither is the fault of a model. Its Python backend (2.51) takes a process for dead that does
    not say otherwise within 10 s of its start, and within 5 s later on, by the clock on the wall: on a very busy
    machine, one that was asleep, or one whose clock was set. Then it kills it, and may abort over the lock that it
    held; or it waits for ever for the end of a process that lives on.
    """


class _Lasting:
    """Whether something has been so for some seconds, each time that it is looked at."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, math.inf

    def __call__(self, so: bool) -> bool:
        now = time.monotonic()
        self._since = min(self._since, now) if so else math.inf
        return now - self._since > self._seconds


class Running:
    """A server from its start on; ``child`` is tritonserver, or the ``docker run`` of it."""

    def __init__(self, launch: Launch, log_path: Path, restarts: int) -> None:
        """Start it. Its output is appended to ``log_path``; ``restarts`` is how often it was started before."""
        log.debug("%s", " ".join(launch.shown()))
        self.mark, self._container = launch.mark, launch.container
        self.log = ServerLog(log_path, log_path.stat().st_size if log_path.exists() else 0)
        self.child = start_child(launch.argv, launch.environment | {RESTARTS_VARIABLE: str(restarts)}, log_path)
        self._stubs: dict[str, Process] = {}
        self._bereft, self._waits, self._hangs = _Lasting(_LAST_WORDS_S), _Lasting(_LOST_S), _Lasting(_BACKTRACE_S)

    def wait_until_ready(self, served: Served, options: Options, port: int, asked: Callable[[], object]) -> bool:
        """Wait for all models, then warm up over HTTP at ``port``; False when ``asked`` to stop meanwhile.

        Raises Crashed, another ServerError or PortBusy where it does not become ready.
        """
        deadline, next_look = time.monotonic() + options.ready_timeout_s, 0.0
        packing = None if self._container else Packing.of(served, self.mark)
        with Progress(len(served.models), packing) as progress:
            while not readiness.is_ready(options.probe_host, port, served.models):
                self.log.new_errors()  # the message of a failed start holds them
                self.log.check_loading()
                progress.show(len(self.log.loaded))
                if asked():
                    return False
                now = time.monotonic()
                if self.child.poll() is not None:
                    self.log.new_errors()
                    raise self._died()
                if self._hangs(self.log.struck is not None):
                    raise Crashed(f"tritonserver hangs since signal {self.log.struck} (log: {self.log.path})")
                if now >= next_look:  # /proc is read through for it, which takes 10 ms
                    self._check_processes()
                    if packing:
                        packing.find()
                    next_look = now + _LOOK_S
                if now > deadline:
                    raise ServerError(
                        f"the server was not ready within {options.ready_timeout_s} s; --ready-timeout gives it "
                        f"more (log: {self.log.path})"
                    )
                time.sleep(_POLL_S)
        readiness.warm_up(served, options, port, timeout_s=options.ready_timeout_s)
        self._stubs = leftovers.stubs(self.mark)
        return not asked()

    def _died(self) -> MinitronError:
        code = self.child.returncode
        error = self.log.explain(f"tritonserver ended with {ending(code)} before it was ready")
        return Crashed(str(error)) if signal_of(code) in _CRASHES else error

    def _check_processes(self) -> None:
        """Raise ServerError where a model's process has died and tritonserver does not say so, Crashed where it has not
        and is waited for."""
        if self._bereft(not self._container and bool(leftovers.dead_children(self.child.pid))):
            raise ServerError(
                f"the process of a model ended while it was loaded: {self.log.last_words()} (log: {self.log.path})"
            )
        if self._waits(leftovers.waits_for_a_process(self.mark)):
            raise Crashed(
                f"tritonserver took the process of a model for dead, and waits for the end of it (log: {self.log.path})"
            )

    def crashed(self) -> str | None:
        """How the server ended by itself, or the process of a model that it cannot answer without; None: it did not."""
        if self.child.poll() is not None:
            return f"tritonserver ended by itself with {ending(self.child.returncode)}"
        if lost := self.lost():
            return f"the process of {', '.join(lost)} ended by itself"
        if self._hangs(self.log.struck is not None):
            return f"tritonserver hangs since signal {self.log.struck}"
        return None

    def lost(self) -> list[str]:
        """The instances of Python models that were there when the server was ready, and have no process any more."""
        return [name for name, process in self._stubs.items() if not process.lives()]


def signal_of(code: int) -> int:
    """The signal that an exit code tells of, or 0; a shell and docker write 128 + N for signal N."""
    return -code if code < 0 else code - 128 if code > 128 else 0


def ending(code: int) -> str:
    """What an exit code says, in words."""
    number = signal_of(code)
    return f"signal {number}" if number else f"exit code {code}"


def start_child(
    argv: tuple[str, ...], environment: dict[str, str], log_path: Path, *, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """In a session of its own; it gets SIGTERM should this process be killed (prctl(2), PR_SET_PDEATHSIG).

    What it prints is appended to ``log_path``, save its stdout where subprocess is told of another place for it.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with open(log_path, "ab") as file:
        return subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=file if stdout is None else stdout, stderr=file,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (there are no threads yet)
        )  # fmt: skip
