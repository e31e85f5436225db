"""The client for asyncio: the blocking client's methods with ``async``, for hundreds of streams at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from minitron import failures
from minitron.errors import Cancelled, ClientError, DeadlineExceeded, NotReady
from minitron.text.channel import PATIENT_KEEPALIVE_S
from minitron_client.client import dialect, questions
from minitron_client.client.answer import STOP_GRACE_S, Chunk, Exchange, Response
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import DEFAULT_URL, INFER_RPC, ApiKey, Deadline, Endpoint, Retry, Tls
from minitron_client.client.questions import Question
from minitron_client.client.request import Request, as_request

log = logging.getLogger(__name__)


class AsyncClient:
    """A connection to one server for one event loop; arguments, methods and errors are those of ``Client``."""

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
        self._endpoint = Endpoint.of(url, tls, api_key, keepalive_s)
        self._model, self._deadline_s, self._retry = model, deadline_s, retry or Retry()
        self._tokenizer = None if tokenizer is None else Path(tokenizer)
        self._metadata = self._endpoint.metadata
        self._models: dict[str | None, ServedModel] = {}
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._leaving: set[asyncio.Task[None]] = set()
        self._opened: Any = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all that is in flight and close the connection."""
        for stream in list(self._streams):
            stream.leave()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=STOP_GRACE_S)
        if self._opened is not None:
            await self._opened.close()

    async def generate(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Response:
        """Wait for the whole answer to a prompt (``options``: fields of Request) or a Request."""
        async with AsyncStream(self, asked, options, model, deadline_s, stream=False) as stream:
            async for _ in stream:
                pass
            return stream.response

    def stream(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> AsyncStream:
        """Iterate over the chunks of the answer to a prompt or a Request; it is sent when the iteration starts."""
        return AsyncStream(self, asked, options, model, deadline_s, stream=True)

    async def generate_batch(
        self,
        asked: Sequence[str | Request],
        *,
        concurrency: int = 16,
        model: str | None = None,
        deadline_s: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Whole answers to many prompts, in their order, ``concurrency`` at once; the first failure is raised."""
        free = asyncio.Semaphore(max(concurrency, 1))

        async def one(prompt: str | Request) -> Response:
            async with free:
                return await self.generate(prompt, model=model, deadline_s=deadline_s, **options)

        tasks = [asyncio.ensure_future(one(prompt)) for prompt in asked]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def stop(self, request_id: str, *, model: str = "tensorrt_llm") -> None:
        """Tell a model to end its request of this id; an unknown id is no error."""
        message = dialect.stop_message(await self.served_model(model, deadline_s=STOP_GRACE_S), request_id)
        try:
            answers = [one async for one in self._infer(message, timeout=STOP_GRACE_S, metadata=self._metadata)]
            if error_message := next((answer.error_message for answer in answers if answer.error_message), None):
                raise failures.of_text(error_message, self._endpoint.url)
        except grpc.RpcError as error:
            raise failures.of_status(error, self._endpoint.url) from None

    async def is_live(self) -> bool:
        """Whether a server answers there."""
        return await self._yes(questions.live())

    async def is_ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return await self._yes(questions.ready())

    async def is_model_ready(self, name: str) -> bool:
        """Whether one model is ready."""
        return await self._yes(questions.model_ready(name))

    async def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return dict(await self._ask(questions.metadata()))

    async def model_metadata(self, model: str | None = None) -> dict[str, Any]:
        """Versions, inputs and outputs of a model."""
        return dict(await self._ask(questions.model_metadata(model or (await self.served_model()).name)))

    async def config(self, model: str | None = None) -> dict[str, Any]:
        """A model's config as the server completed it."""
        return dict(await self._ask(questions.config(model or (await self.served_model()).name)))

    async def statistics(self, model: str | None = None) -> list[dict[str, Any]]:
        """Counts and durations of a model, for each version."""
        return list(await self._ask(questions.statistics(model or (await self.served_model()).name)))

    async def served_model(self, name: str | None = None, *, deadline_s: float | None = None) -> ServedModel:
        """What the client knows of a model (None: the one that takes the requests): its dialect and its inputs."""
        return await self._served_model(name, Deadline(deadline_s))

    async def _served_model(self, name: str | None, deadline: Deadline) -> ServedModel:
        name = name or self._model
        if name not in self._models:
            steps = questions.find_model(name, self._endpoint.url, self._tokenizer)
            found = await self._follow(steps, deadline)
            self._models[name] = self._models[found.name] = found
        return self._models[name]

    async def _follow(self, steps: Generator[Question, Any, ServedModel], deadline: Deadline) -> ServedModel:
        answer = None
        while True:
            try:
                question = steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = await self._ask(question, deadline)

    async def _ask(self, question: Question, deadline: Deadline | None = None) -> Any:
        timeout = (deadline or Deadline(None)).question_s
        try:
            call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(self._channel), question.rpc)
            return question.read(await call(question.message, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise failures.of_status(error, self._endpoint.url) from None

    async def _yes(self, question: Question) -> bool:
        try:
            return bool(await self._ask(question))
        except (NotReady, DeadlineExceeded):
            return False

    @property
    def _channel(self) -> grpc.aio.Channel:
        """The channel; made on first use, because it belongs to the event loop that runs then."""
        if self._opened is None:
            self._opened = self._endpoint.aio_channel()
        return self._opened

    @property
    def _infer(self) -> Any:
        return self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )

    async def _stop_quietly(self, request_id: str, model: str) -> None:
        with contextlib.suppress(ClientError):  # the server is gone: nothing to stop
            await self.stop(request_id, model=model)

    def _later(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Let ``work`` go on after its caller has left; ``close`` waits for it. Raises RuntimeError without a loop."""
        task = asyncio.get_running_loop().create_task(work(*arguments))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


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
        self._call: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Future[Any] | None = None
        self._request = as_request(asked, options)
        self._request.check()
        client._streams.add(self)

    @property
    def request_id(self) -> str:
        """The id under which the server knows the request; "" before it is sent."""
        return self._exchange.request_id if self._exchange else ""

    @property
    def response(self) -> Response:
        """The answer as far as it has come; whole once the iteration has ended. Raises Cancelled if none was sent."""
        return self._sent.response()

    async def __anext__(self) -> Chunk:
        if self._exchange is None and not self._ended:
            await self._open()
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
        left_s = deadline.left_s
        if served.takes_stops and left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expire)
        self._send()

    def _send(self) -> None:
        self._sent.sending()
        self._call = self._client._infer(
            self._sent.message, timeout=self._sent.call_timeout_s, metadata=self._client._metadata
        )

    async def _receive(self) -> None:
        try:
            response = await self._read()
            if response is grpc.aio.EOF:
                self._end()
                self._sent.check_whole()
            else:
                self._ready.extend(self._sent.take(response))
                if self._sent.leaves_engine:
                    self._stop()
                    self._end()
        except asyncio.CancelledError:
            if early := self._sent.ended_early():  # our own cancel of the call, not one of the caller's task
                self._end()
                raise early from None
            raise
        except grpc.RpcError as error:
            await self._send_again_or_raise(self._sent.failure(error))
        except ClientError as error:
            await self._send_again_or_raise(error)

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
            self._end()
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
        else:
            self._call.cancel()

    def _end(self) -> None:
        self._ended = True
        if self._timer:
            self._timer.cancel()
        self._finish()

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
