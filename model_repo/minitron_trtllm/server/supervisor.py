"""Runs one server as a child process and stays with it to the end.

The child has its own session, so that Ctrl-C reaches the supervisor alone, which then drains: SIGTERM to the server,
which finishes the streams in flight and takes no new ones; what outlives the exit timeout is killed. Should the
supervisor itself be killed, the kernel sends the child that SIGTERM (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from minitron_trtllm import errors
from minitron_trtllm.errors import ServerError
from minitron_trtllm.server import readiness
from minitron_trtllm.server.launch import UNLOAD_S, Launch, Options, Served
from minitron_trtllm.server.server_log import ServerLog
from minitron_trtllm.server.state import State

log = logging.getLogger(__name__)

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold the signals that stop a server back until somebody hears them.

    For the time between the first trace of a server and its supervisor: a signal there would leave the trace behind.
    Whoever has set its handlers calls ``hear_stop_signals``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        hear_stop_signals()


def hear_stop_signals() -> None:
    """Let the signals through that were held back, those first that came meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class Supervisor:
    """One server from its start to its end; ``run`` does it all."""

    def __init__(self, launch: Launch, served: Served, options: Options, state: State) -> None:
        self._launch, self._served, self._options, self._state = launch, served, options, state
        self._log = ServerLog(state.log)
        self._asked: list[int] = []  # the stop signals that came

    def run(self, on_ready: Callable[[State], None]) -> int:
        """Start the server, call ``on_ready`` when it answers, stay until it ends, and return its exit code.

        Raises ServerError and PortBusy when it does not become ready, ServerError when it outlives its exit timeout.
        Nothing of the server is left when this returns or raises, save its log after a failure.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask_to_stop)
        hear_stop_signals()
        try:
            code = self._run(on_ready)
        except BaseException:
            self._state.fail()
            raise
        if code in (0, errors.EXIT_INTERRUPTED):
            self._state.clear()
        else:
            self._state.fail()
        return code

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _run(self, on_ready: Callable[[State], None]) -> int:
        child = self._start()
        if not self._wait_until_ready(child):
            log.info("stopped before the server was ready")
            return errors.EXIT_INTERRUPTED
        self._state = self._state.enter("ready")
        on_ready(self._state)
        while child.poll() is None and not self._asked:
            self._show_errors()
            time.sleep(_POLL_S)
        if child.returncode is None:
            self._drain(child)
        else:
            self._show_errors()
            log.error("tritonserver ended by itself with %d (log: %s)", child.returncode, self._log.path)
        # A shell's way to say that a signal ended it.
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        log.debug("%s", " ".join(self._launch.shown()))
        parent = os.getpid()
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with open(self._log.path, "ab") as file:
            return subprocess.Popen(
                self._launch.argv, env=self._launch.environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (there are no threads yet)
            )  # fmt: skip

    def _wait_until_ready(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait for all models, then warm up; False when asked to stop meanwhile."""
        port = int(self._state.urls["http"].rpartition(":")[2])
        deadline = time.monotonic() + self._options.ready_timeout_s
        with _Waiting(len(self._served.models)) as waiting:
            while not readiness.is_ready(self._options.probe_host, port, self._served.models):
                self._log.new_errors()  # the message of a failed start holds them
                self._log.check_stubs()
                waiting.show(len(self._log.loaded))
                if self._asked:
                    return False
                if child.poll() is not None:
                    self._log.new_errors()
                    raise self._log.explain(child.returncode)
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"the server was not ready within {self._options.ready_timeout_s} s; --ready-timeout gives it "
                        f"more (log: {self._log.path})"
                    )
                time.sleep(_POLL_S)
        readiness.warm_up(self._served, self._options, port, timeout_s=self._options.ready_timeout_s)
        return not self._asked

    def _drain(self, child: subprocess.Popen[bytes]) -> None:
        """End the server in good order; raises ServerError when it does not end."""
        self._state = self._state.enter("draining")
        log.info(
            "draining: streams in flight may finish for %d s; Ctrl-C again ends it now", self._options.exit_timeout_s
        )
        child.terminate()
        self._asked.clear()
        deadline = time.monotonic() + self._served.exit_timeout_s(self._options.exit_timeout_s) + UNLOAD_S
        while child.poll() is None:
            self._show_errors()
            if signal.SIGINT in self._asked:
                child.kill()
                child.wait()
                log.warning("ended at once, as asked; streams in flight were cut off")
            elif time.monotonic() > deadline:
                child.kill()
                child.wait()
                raise ServerError(
                    f"the server outlived its exit timeout of {self._options.exit_timeout_s} s and was killed "
                    f"(log: {self._log.path})"
                )
            time.sleep(_POLL_S)

    def _show_errors(self) -> None:
        for text in self._log.new_errors():
            log.error("tritonserver: %s", text)


class _Waiting:
    """How many models are loaded: a bar on a terminal, a line for each change elsewhere."""

    def __init__(self, models: int) -> None:
        self._models, self._shown = models, -1
        self._bar: Any = None

    def __enter__(self) -> _Waiting:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._models, desc="loading models", leave=False, bar_format=_BAR)
        return self

    def show(self, loaded: int) -> None:
        if self._bar is not None:
            self._bar.n = loaded
            self._bar.refresh()
        elif loaded != self._shown:
            log.info("loading models: %d of %d", loaded, self._models)
        self._shown = loaded

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


_BAR = "{desc}: {n_fmt} of {total_fmt}, {elapsed}"
