"""Runs one server and stays with it to the end.

The server has its own session, so that Ctrl-C reaches the supervisor alone, which then drains (``draining``). A server
that crashes is started again, with the same ports, after a pause and not for ever (``restarts``). Should the supervisor
itself be killed, the kernel sends the server SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from minitron import errors
from minitron.errors import NotDrained, PortBusy, ServerError
from minitron_triton.server.control import Control
from minitron_triton.server.draining import Drain
from minitron_triton.server.launch import Launch, Options, Served
from minitron_triton.server.openai import OpenAi
from minitron_triton.server.restarts import WINDOW_S, Restarts
from minitron_triton.server.running import Crashed, Running
from minitron_triton.server.state import State

log = logging.getLogger(__name__)

_POLL_S = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CUT_OFF = 128 + signal.SIGKILL  # as a shell says it


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


class _AskedToStop(Exception):
    """Somebody asked while there was no server to drain."""


class Supervisor:
    """One server from its start to its end; ``run`` does it all."""

    def __init__(
        self, launch: Launch, served: Served, options: Options, state: State, openai: OpenAi | None = None
    ) -> None:
        self._openai = openai
        self._launch, self._served, self._options, self._state = launch, served, options, state
        self._port = int(state.urls["http"].rpartition(":")[2])
        self._restarts = Restarts(options.restarts)
        self._asked: list[int] = []  # the stop signals that came

    def run(self, on_ready: Callable[[State], None]) -> int:
        """Start the server, call ``on_ready`` when it answers, stay until it ends, and return its exit code.

        Raises ServerError and PortBusy when it does not become ready, ServerError when it dies while it drains,
        NotDrained when it outlives its exit timeout. Nothing of the server is left when this returns or raises, save
        its state and log where it did not end in good order.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask_to_stop)
        hear_stop_signals()
        end = "failed"
        try:
            code = self._live(on_ready)
            end = "stopped" if code == 0 else "killed" if self._asked else "failed"
        except _AskedToStop:
            log.info("stopped while the server was not ready")
            code, end = errors.EXIT_INTERRUPTED, "stopped"
        except NotDrained:
            end = "killed"
            raise
        finally:
            if self._openai:
                self._openai.end()
            if end == "stopped" and not self._restarts.count:
                self._state.clear()
            else:
                self._state.keep(end)
        return code

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _live(self, on_ready: Callable[[State], None]) -> int:
        running = self._start()
        if self._openai:
            self._state = self._state.enter("ready", urls=self._state.urls | {"openai": self._openai.start()})
        on_ready(self._state)
        while not self._asked:
            how = running.crashed()
            self._show_errors(running)
            if how and running.child.returncode == 0:
                log.warning("%s", how)
                return 0
            if how:
                log.error("%s (log: %s)", how, running.log.path)
                if not (again := self._bring_back()):
                    return _shells(running.child.returncode)
                running = again
            if self._openai:
                self._openai.restart_if_dead()
            time.sleep(_POLL_S)
        return self._drain(running)

    def _start(self) -> Running:
        try:
            return self._bring_up()
        except Crashed as error:
            log.error("%s", error)
            if running := self._bring_back():
                return running
            raise

    def _bring_up(self) -> Running:
        """A server that is ready; raises ServerError, PortBusy, _AskedToStop."""
        running = Running(self._launch, self._state.log, self._restarts.count)
        if not running.wait_until_ready(self._served, self._options, self._port, lambda: self._asked):
            raise _AskedToStop
        self._state = self._state.enter("ready")
        return running

    def _bring_back(self) -> Running | None:
        """The server that crashed, ready again; None when it crashes too often. Raises _AskedToStop."""
        while (pause_s := self._restarts.next_pause_s()) is not None:
            self._state = self._state.enter("restarting", restarts=self._restarts.count)
            self._state.reap()
            log.warning("starting it again in %g s (restart %d)", pause_s, self._restarts.count)
            self._wait(pause_s)
            with open(self._state.log, "a", encoding="utf-8") as file:
                file.write(f"--- minitron: restart {self._restarts.count} ---\n")
            try:
                return self._bring_up()
            except (ServerError, PortBusy) as error:
                log.error("%s", error)
        if self._options.restarts:
            log.error("it crashed %d times within %g minutes and stays down", self._options.restarts + 1, WINDOW_S / 60)
        return None

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._asked:
                raise _AskedToStop
            time.sleep(min(_POLL_S, seconds))

    def _drain(self, running: Running) -> int:
        self._asked.clear()  # before anybody can know that it drains, and ask again
        self._state = self._state.enter("draining")
        log.info(
            "draining: streams in flight may finish for %d s; Ctrl-C again ends it now", self._options.exit_timeout_s
        )

        def hurry() -> bool:
            self._show_errors(running)
            return signal.SIGINT in self._asked

        if self._openai:
            self._openai.drain()
        control = Control(self._options, self._port)
        timeout_s, metrics = self._options.exit_timeout_s, self._state.urls["metrics"]
        if Drain(running, self._served, control, timeout_s, hurry, metrics=metrics).run():
            return 0
        log.warning("ended at once, as asked; streams in flight were cut off")
        return _CUT_OFF

    def _show_errors(self, running: Running) -> None:
        for text in running.log.new_errors():
            log.error("tritonserver: %s", text)


def _shells(code: int | None) -> int:
    """An exit code as a shell tells it; that of a server that runs on without one of its models is ServerError's."""
    if code is None:
        return ServerError.exit_code
    return code if code >= 0 else 128 - code
