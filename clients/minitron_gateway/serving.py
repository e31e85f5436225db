"""The gateway's processes: one that serves, or several behind one address, from the first signal to the last stream.

Several workers listen on one port (SO_REUSEPORT; the kernel spreads the connections), each with its own limits and its
own view of how busy the servers are. A worker that dies is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from minitron import tracing
from minitron.errors import PortBusy, ServerError
from minitron_gateway.settings import Settings

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # see metrics, which may be imported only when it is set
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_RESTART_AFTER_S = 1.0


def run(settings: Settings, on_ready: Callable[[Settings], None]) -> int:
    """Serve until told to stop, then drain; returns the exit code. Raises PortBusy, ServerError."""
    for name in (_FOLDER_VARIABLE, _FOLDER_VARIABLE.lower()):
        os.environ.pop(name, None)  # of the program that started us: its counters are not ours
    listening = _bind(settings, shared=settings.workers > 1)
    settings = replace(settings, port=listening.getsockname()[1])
    with contextlib.closing(listening):
        if settings.workers == 1:
            _serve(settings, listening, lambda: on_ready(settings))
            return 0
        return _Workers(settings).run(lambda: on_ready(settings))


def _bind(settings: Settings, *, shared: bool) -> socket.socket:
    """A socket on the address; raises PortBusy. A shared one is tried alone first: it shares with strangers too."""
    if shared and settings.port:
        _bind(settings, shared=False).close()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise PortBusy(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); --listen names another address"
        ) from None
    return bound


def _serve(settings: Settings, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """One process of the gateway, to its end."""
    import uvicorn
    import uvloop

    from minitron_gateway.app import Gateway, application

    class Server(uvicorn.Server):
        """Signals are ours: a stop drains first, and only then closes the door."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    tracing.start("minitron-gateway")
    gateway = Gateway(settings)
    config = uvicorn.Config(
        application(gateway), http="httptools", loop="uvloop", lifespan="off", ws="none",
        log_config=None, log_level=logging.WARNING, access_log=False, server_header=False,
        backlog=_BACKLOG, timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=5,
        ssl_certfile=settings.cert or None, ssl_keyfile=settings.tls_key or None,
    )  # fmt: skip
    server = Server(config)

    async def serve() -> None:
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        await gateway.open()

        def stop(number: int) -> None:
            if asked.is_set() and number == signal.SIGINT:
                server.should_exit = server.force_exit = True
            asked.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
        serving = asyncio.create_task(server.serve([listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            on_ready()
        stopping = asyncio.create_task(asked.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            log.info("draining: streams in flight may finish for %g s; Ctrl-C again ends it now", settings.drain_s)
            await gateway.drain()
            server.should_exit = True
        await serving
        await gateway.close()
        for number in _SIGNALS:  # it has ended well, and one more signal changes nothing of that
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    uvloop.run(serve())


class _Workers:
    """Several processes, started again where they die, until a signal comes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked: list[int] = []  # the stop signals that came
        self._context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="minitron-gateway-")
        os.environ[_FOLDER_VARIABLE] = self._folder

    def run(self, on_ready: Callable[[], None]) -> int:
        """See ``run`` of the module."""
        for number in _SIGNALS:
            signal.signal(number, lambda got, _: self._asked.append(got))
        workers = [self._start() for _ in range(self._settings.workers)]
        try:
            self._wait_until_ready(workers)
            if not self._asked:
                on_ready()
            while not self._asked:
                self._revive(workers)
                time.sleep(_POLL_S)
            self._stop([process for process, _ in workers])
            return 0
        finally:
            for process, _ in workers:
                process.kill()
                process.join()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> tuple[SpawnProcess, Connection]:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(self._settings, there, os.getpid()))
        process.start()
        there.close()
        return process, here

    def _wait_until_ready(self, workers: list[tuple[SpawnProcess, Connection]]) -> None:
        for process, said in workers:
            while not said.poll(_POLL_S):
                if self._asked:
                    return
                if process.exitcode is not None:
                    raise ServerError(f"a worker of the gateway ended with {process.exitcode} before it was ready")
            try:
                said.recv()
            except EOFError:
                process.join()
                raise ServerError(
                    f"a worker of the gateway ended with {process.exitcode} before it was ready"
                ) from None

    def _revive(self, workers: list[tuple[SpawnProcess, Connection]]) -> None:
        for place, (process, _) in enumerate(workers):
            if process.exitcode is not None:
                log.error("a worker of the gateway ended with %d; another is started", process.exitcode)
                self._forget(process)
                time.sleep(_RESTART_AFTER_S)
                workers[place] = self._start()

    def _forget(self, process: SpawnProcess) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(process.pid, self._folder)  # type: ignore[no-untyped-call]

    def _stop(self, processes: list[SpawnProcess]) -> None:
        """Let every worker drain; a second Ctrl-C ends them."""
        log.info("draining: streams in flight may finish for %g s; Ctrl-C again ends it now", self._settings.drain_s)
        for process in processes:
            process.terminate()
        seen = len(self._asked)
        while any(process.exitcode is None for process in processes):
            if signal.SIGINT in self._asked[seen:]:
                return
            time.sleep(_POLL_S)


def _work(settings: Settings, ready: Connection, parent: int) -> None:
    """The main function of a worker process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with contextlib.closing(_bind(settings, shared=True)) as listening:
        _serve(settings, listening, lambda: ready.send(True))
