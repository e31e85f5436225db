"""One request over gRPC on its way: sent, read, sent again where nobody has taken it, and left in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from minitron import tracing
from minitron.errors import Cancelled, ClientError, NotReady
from minitron.text import trace_context
from minitron_client.client import spans
from minitron_client.client.answer import STOP_GRACE_S, Chunk, Exchange, Response
from minitron_client.client.endpoint import Deadline
from minitron_client.client.request import Request, as_request

if TYPE_CHECKING:
    from minitron_client.client.aio import AsyncClient

log = logging.getLogger(__name__)


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one answer as they come. Leaving it (``break``, the end of its block) cancels the request."""

    def __init__(
        self, client: AsyncClient, asked: str | Request, options: dict[str, Any], model: str | None,
        deadline_s: float | None, *, stream: bool,
    ) -> None:  # fmt: skip
        self._client, self._model, self._streaming = client, model, stream
        self._deadline_s = client._deadline_s if deadline_s is None else deadline_s
        self._ready: deque[Chunk] = deque()
        self._exchange: Exchange | None = None
        self._ended = False
        self._span: tracing.Span | None = None
        self._call: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Future[Any] | None = None
        self._request = as_request(asked, options)
        self._request.check()
        client._streams.add(self)

    async def start(self) -> None:
        """Send the request now, and not with the first step of the iteration."""
        if self._exchange is None and not self._ended:
            await self._open()

    @property
    def in_flight(self) -> bool:
        """Whether it has been sent and has not ended."""
        return self._exchange is not None and not self._ended

    @property
    def request_id(self) -> str:
        """The id under which the server knows the request; "" before it is sent."""
        return self._exchange.request_id if self._exchange else ""

    @property
    def response(self) -> Response:
        """The answer as far as it has come; whole once the iteration has ended. Raises Cancelled if none was sent."""
        return self._sent.response()

    async def __anext__(self) -> Chunk:
        await self.start()
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            await self._receive()
        return self._ready.popleft()

    def cancel(self) -> None:
        """End the request; whoever iterates gets Cancelled."""
        if self._exchange and not self._ended and not self._exchange.final:
            self._exchange.stopped = True
            self._stop()

    async def close(self) -> None:
        """End the request, if it has not ended, and release what it holds."""
        self.leave()

    def leave(self) -> None:
        """As ``close``, for code that cannot wait."""
        if not self._ended:
            self.cancel()
            self._end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and the channel with it
            self.leave()

    @property
    def _sent(self) -> Exchange:
        if self._exchange is None:
            raise Cancelled("the request has not been sent; iterate over the stream first")
        return self._exchange

    async def _open(self) -> None:
        deadline = Deadline(self._deadline_s)
        served = await self._client._served_model(self._model, deadline)
        self._exchange = Exchange(
            served, self._request, self._client._endpoint.url,
            stream=self._streaming, deadline=deadline, retry=self._client._retry,
        )  # fmt: skip
        self._span = spans.begin(
            self._request, served.name, self._client._endpoint.url, stream=self._exchange.streaming
        )
        left_s = deadline.left_s
        if served.takes_stops and left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expire)
        self._send()

    def _send(self) -> None:
        self._sent.sending()
        headers = trace_context.for_triton(self._span.headers) if self._span else ()
        self._call = self._client._infer(
            self._sent.message, timeout=self._sent.call_timeout_s, metadata=self._client._metadata + headers
        )

    async def _receive(self) -> None:
        try:
            response = await self._read()
            left = self._ended  # by somebody else meanwhile; then the rest is read elsewhere
            if left:
                pass
            elif response is grpc.aio.EOF:
                self._sent.check_whole()
                self._end()
            else:
                self._ready.extend(self._sent.take(response))
                if self._sent.leaves_engine:
                    self._stop()
                    self._end()
        except asyncio.CancelledError:
            if early := self._sent.ended_early():  # our own cancel of the call, not one of the caller's task
                self._end(early)
                raise early from None
            raise
        except grpc.RpcError as error:
            await self._send_again_or_raise(self._sent.failure(error))
        except ClientError as error:
            await self._send_again_or_raise(error)
        else:
            if left:
                raise Cancelled(f"{self._client._endpoint.url}: request {self.request_id} was cancelled")

    async def _read(self) -> Any:
        if not self._sent.model.takes_stops:
            return await self._call.read()
        # A task that is cancelled while it reads would cancel the call with it, which leaks the ensemble's request.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        response = await asyncio.shield(self._reading)
        self._reading = None
        return response

    async def _send_again_or_raise(self, error: ClientError) -> None:
        if isinstance(error, NotReady):
            self._client._models.clear()  # it may come back with other models
        delay_s = self._sent.retry_delay_s(error)
        if delay_s is None:
            self._end(error)
            raise error from None
        log.debug("sending request %s again in %.1f s: %s", self.request_id, delay_s, error)
        self._finish()
        await asyncio.sleep(delay_s)
        self._reading = None
        self._send()

    def _expire(self) -> None:
        self._sent.expired = True
        self._stop()

    def _stop(self) -> None:
        """End the generation in the server: with a ``stop``, or by cancelling the stream where nothing takes that."""
        if self._sent.model.takes_stops:
            self._client._later(self._client._stop_quietly, self.request_id, self._sent.model.name)
        elif self._call is not None:
            self._call.cancel()

    def _end(self, error: ClientError | None = None) -> None:
        if self._span is not None and self._span.records:
            spans.end(self._span, self._sent.response(), error)
        self._ended = True
        if self._timer:
            self._timer.cancel()
        self._finish()
        self._call = None  # which holds the connection

    def _finish(self) -> None:
        """Let the call come to its end, for a while, whatever its answer was: a stop, an error, a whole one.

        One that is cancelled while its last response is written stays in Triton (2.51) for ever, and with it the model.
        """
        if self._call is not None and not self._call.done():
            self._client._later(_drain, self._call, self._reading)


async def _drain(call: Any, reading: asyncio.Future[Any] | None) -> None:
    """Read a call to its end, for a while; then cancel it."""

    async def to_the_end() -> None:
        response = await (reading or call.read())
        while response is not grpc.aio.EOF:
            response = await call.read()

    with contextlib.suppress(asyncio.TimeoutError, grpc.RpcError):
        await asyncio.wait_for(to_the_end(), STOP_GRACE_S)
    call.cancel()
