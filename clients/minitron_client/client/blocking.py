"""The clients for scripts and threads: the asynchronous ones, run in an event loop of this process's own.

One thread runs that loop while any client is open. A call hands its coroutine to it and waits, so that any number of
threads may call, also one with an event loop of its own; Ctrl-C ends the wait and cancels what was asked.

Processes may fork. gRPC does not survive a fork with a connection of grpc.aio open, so connections that nothing uses
are closed before, and opened again by the next request. A child that is forked in the middle of an answer gets an error
where it asks anything over gRPC.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from minitron.errors import Cancelled, ClientError
from minitron.text.channel import DEFAULT_URL, PATIENT_KEEPALIVE_S
from minitron_client.client.aio import AsyncClient, any_connected
from minitron_client.client.answer import Chunk, Response
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import ApiKey, Endpoint, Retry, Tls
from minitron_client.client.openai import AsyncHttpClient, AsyncHttpStream, HttpEndpoint
from minitron_client.client.request import Request
from minitron_client.client.stream import AsyncStream

T = TypeVar("T")
C = TypeVar("C", AsyncClient, AsyncHttpClient)
_FORK_S = 2.0  # for connections to be closed before a fork
_INHERITED: list[Any] = []
_GRPC_THREADS = ("event_engine", "grpc_", "lifeguard")  # as gRPC 1.85 names them


def _threads_of_grpc() -> Iterator[str]:
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            if (name := path.read_text()).startswith(_GRPC_THREADS):
                yield name


class _LoopThread:
    """The event loop of all blocking clients of a process, in a thread while any of them is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[_Blocking[Any]] = weakref.WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls = 0
        self._used = False  # since the last fork

    def run(self, client: _Blocking[Any], work: Coroutine[Any, Any, T]) -> T:
        """Wait for what a coroutine of an open client returns; raises what it does."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="minitron-client", daemon=True)
                self._thread.start()
            self._open.add(client)
            self._used = True
            self._calls += 1
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the request was cancelled") from None
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits any more
            raise
        finally:
            with self._lock:
                self._calls -= 1

    def soon(self, call: Callable[[], Any]) -> None:
        """Have the loop call something, without waiting; nothing where there is no loop any more."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)

    def leave(self, client: _Blocking[Any]) -> None:
        """The client is closed; the last one ends the thread."""
        with self._lock:
            self._open.discard(client)
            if self._open or self._loop is None or self._thread is None:
                return
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    def before_fork(self) -> None:
        """Close the connections that nothing uses."""
        self._lock.acquire()
        if self._loop is not None and self._calls == 0:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(_FORK_S)
        # gRPC's threads end soon after its last connection; until then a child would inherit the locks that they hold.
        if self._used and not any_connected():
            self._used, until = False, time.monotonic() + _FORK_S
            while any(_threads_of_grpc()) and time.monotonic() < until:
                time.sleep(0.005)

    async def _disconnect(self) -> None:
        for client in list(self._open):
            if isinstance(client._made, AsyncClient) and client._made._idle:
                await client._made._disconnect()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """The thread is not here; clients make themselves anew. What it held stays: gRPC would crash freeing it."""
        _INHERITED.append((self._loop, list(self._open)))
        self.__init__()  # type: ignore[misc]


_LOOP = _LoopThread()
os.register_at_fork(
    before=_LOOP.before_fork, after_in_parent=_LOOP.after_fork_in_parent, after_in_child=_LOOP.after_fork_in_child
)


class _Blocking(Generic[C]):
    """What the clients of both kinds have in common: the client that does the work, made anew in a forked process."""

    def __init__(self, make: Callable[[], C]) -> None:
        self._make: Callable[[], C] = make
        self._made: C = make()
        self._process = os.getpid()

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _async(self) -> C:
        if self._process != os.getpid():
            self._process, self._made = os.getpid(), self._make()
        return self._made

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return _LOOP.run(self, work)

    def close(self) -> None:
        """End all that is in flight and close the connection."""
        if self._process == os.getpid() and self in _LOOP._open:
            self._run(self._made.close())
            _LOOP.leave(self)

    def generate(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Response:
        """Wait for the whole answer to a prompt (``options``: fields of Request) or a Request."""
        return self._run(self._async.generate(asked, model=model, deadline_s=deadline_s, **options))

    def stream(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Stream:
        """Send a prompt or a Request and iterate over the chunks of its answer; leaving the iterator cancels it."""

        async def started() -> AsyncStream | AsyncHttpStream:
            stream = self._async.stream(asked, model=model, deadline_s=deadline_s, **options)
            await stream.start()
            return stream

        return Stream(self, self._run(started()))

    def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server; nothing is known over HTTP."""
        return self._run(self._async.metadata())


B = TypeVar("B", bound=_Blocking[Any])


class Client(_Blocking[AsyncClient]):
    """A connection to one server; any number of threads may use it at once. Use it in a ``with`` block, or close it.

    Arguments, methods and errors are those of ``AsyncClient``.
    """

    def __init__(
        self,
        url: str | Endpoint = DEFAULT_URL,
        *,
        model: str | None = None,
        tls: Tls | None = None,
        api_key: ApiKey | None = None,
        deadline_s: float | None = None,
        retry: Retry | None = None,
        keepalive_s: float = PATIENT_KEEPALIVE_S,
        tokenizer: Path | str | None = None,
    ) -> None:
        super().__init__(
            lambda: AsyncClient(
                url, model=model, tls=tls, api_key=api_key, deadline_s=deadline_s, retry=retry,
                keepalive_s=keepalive_s, tokenizer=tokenizer,
            )
        )  # fmt: skip

    def generate_batch(
        self,
        asked: Sequence[str | Request],
        *,
        concurrency: int = 16,
        model: str | None = None,
        deadline_s: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Whole answers to many prompts, in their order, ``concurrency`` at once; the first failure is raised."""
        return self._run(
            self._async.generate_batch(asked, concurrency=concurrency, model=model, deadline_s=deadline_s, **options)
        )

    def stop(self, request_id: str, *, model: str = "tensorrt_llm") -> None:
        """Tell a model to end its request of this id; an unknown id is no error."""
        self._run(self._async.stop(request_id, model=model))

    def is_live(self) -> bool:
        """Whether a server answers there."""
        return self._run(self._async.is_live())

    def is_ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return self._run(self._async.is_ready())

    def is_model_ready(self, name: str) -> bool:
        """Whether one model is ready."""
        return self._run(self._async.is_model_ready(name))

    def model_metadata(self, model: str | None = None) -> dict[str, Any]:
        """Versions, inputs and outputs of a model."""
        return self._run(self._async.model_metadata(model))

    def config(self, model: str | None = None) -> dict[str, Any]:
        """A model's config as the server completed it."""
        return self._run(self._async.config(model))

    def statistics(self, model: str | None = None) -> list[dict[str, Any]]:
        """Counts and durations of a model, for each version."""
        return self._run(self._async.statistics(model))

    def served_model(self, name: str | None = None, *, deadline_s: float | None = None) -> ServedModel:
        """What the client knows of a model (None: the one that takes the requests): its dialect and its inputs."""
        return self._run(self._async.served_model(name, deadline_s=deadline_s))


class HttpClient(_Blocking[AsyncHttpClient]):
    """``Client`` over HTTP, as far as commands need it; arguments and errors are those of ``AsyncHttpClient``."""

    def __init__(self, endpoint: HttpEndpoint, *, model: str | None = None, deadline_s: float | None = None) -> None:
        super().__init__(lambda: AsyncHttpClient(endpoint, model=model, deadline_s=deadline_s))

    def served_model(self, name: str | None = None) -> ServedModel:
        """The model that is named here or was before, or the first of those that are served; raises ClientError."""
        return self._run(self._async.served_model(name))


class Stream(Iterator[Chunk]):
    """The chunks of one answer as they come. Leaving it (``break``, the end of its block) cancels the request."""

    def __init__(self, client: _Blocking[Any], stream: AsyncStream | AsyncHttpStream) -> None:
        self._client, self._stream, self._process = client, stream, os.getpid()

    @property
    def request_id(self) -> str:
        """The id under which the server knows the request."""
        return self._stream.request_id

    @property
    def response(self) -> Response:
        """The answer as far as it has come; whole once the iteration has ended."""
        return self._stream.response

    def __next__(self) -> Chunk:
        if self._process != os.getpid():
            raise ClientError("this answer is another process's: it was asked for before the fork")
        chunk = self._client._run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        return await anext(self._stream, None)

    def cancel(self) -> None:
        """End the request from any thread; whoever iterates gets Cancelled."""
        _LOOP.soon(self._stream.cancel)

    def close(self) -> None:
        """End the request, if it has not ended, and release what it holds."""
        if self._process == os.getpid():
            self._client._run(self._stream.close())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_process") and self._process == os.getpid():
            _LOOP.soon(self._stream.leave)
