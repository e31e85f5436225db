"""What sends measured requests over gRPC or HTTP: bytes made before the run, only counts and times of the answers kept.

It does what ``AsyncClient`` does with less work per response, never sends a request twice, and turns every failure into
the outcome of a record. Errors are told apart by the same texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from minitron import failures
from minitron.errors import Cancelled, ClientError, DeadlineExceeded, StreamBroken
from minitron.text.channel import INFER_RPC
from minitron_client.bench.record import OK, Record
from minitron_client.client import dialect, openai
from minitron_client.client.answer import STOP_GRACE_S
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import Endpoint
from minitron_client.client.request import Request

_BETWEEN_QUESTIONS_S = 0.1


@dataclass(frozen=True)
class SerializedRequest:
    """A request as the bytes that will be sent, and the bytes that end it (None: its stream is cancelled).

    Over HTTP the bytes are a body.
    """

    message: bytes
    max_tokens: int
    stop: bytes | None = None


def serialize(model: ServedModel, request: Request, request_id: str, *, stream: bool = True) -> SerializedRequest:
    """Make the bytes of a request; raises InvalidRequest."""
    request.check()
    if model.dialect == openai.DIALECT:
        return SerializedRequest(openai.body(request, model.name, stream=stream), request.max_tokens)
    message = dialect.message(model, request, request_id, stream=stream)
    stop = dialect.stop_message(model, request_id).SerializeToString() if model.takes_stops else None
    return SerializedRequest(message.SerializeToString(), request.max_tokens, stop)


class Sender(Protocol):
    """What sends the requests of one event loop to one server."""

    async def send(self, request: SerializedRequest, record: Record, deadline_s: float | None = None) -> Record:
        """Send a request now and fill in its record; raises nothing but the cancellation of its own task."""

    async def is_ready(self, within_s: float) -> bool:
        """Whether a server is there that takes requests, or becomes it ``within_s``."""

    async def close(self) -> None:
        """Wait for the end of what was left, and close the connections."""


def sender_to(endpoint: openai.AnyEndpoint) -> Sender:
    """For what the server speaks; to be made in the event loop that uses it."""
    return GrpcSender(endpoint) if isinstance(endpoint, Endpoint) else HttpSender(endpoint)


class GrpcSender:
    """A channel to one server for one event loop; each request is a gRPC stream of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url, self._metadata = endpoint.url, endpoint.metadata
        self._channel = endpoint.aio_channel()
        self._leaving: set[asyncio.Task[None]] = set()
        self._infer = self._channel.unary_stream(INFER_RPC, None, pb.ModelStreamInferResponse.FromString)
        self._ready = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ServerReady

    async def close(self) -> None:
        """Wait for the end of what was left, and close the channel."""
        if self._leaving:
            await asyncio.wait(self._leaving)
        await self._channel.close()

    async def send(self, request: SerializedRequest, record: Record, deadline_s: float | None = None) -> Record:
        """Send a request now and fill in its record; raises nothing but the cancellation of its own task."""
        record.max_tokens = request.max_tokens
        record.sent_ns = time.monotonic_ns()
        call = self._infer(request.message, metadata=self._metadata)
        reading = asyncio.ensure_future(self._receive(call, record))
        try:
            await asyncio.wait({reading}, timeout=deadline_s)
            if not reading.done():
                raise DeadlineExceeded(f"{self._url}: no complete answer within the deadline")
            reading.result()
            record.outcome = OK
        except asyncio.CancelledError:
            record.outcome, record.error = Cancelled.__name__, "the run ended"
            raise
        except grpc.RpcError as error:
            fail(record, failures.of_status(error, self._url, streaming=True))
        except ClientError as error:
            fail(record, error)
        finally:
            record.ended_ns = time.monotonic_ns()
            if not reading.done():
                leaving = asyncio.ensure_future(self._leave(request, reading))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
        return record

    async def _leave(self, request: SerializedRequest, reading: asyncio.Future[None]) -> None:
        """End a request whose answer nobody waits for, and read it to its end for a while."""
        if request.stop is not None:
            with contextlib.suppress(grpc.RpcError):
                async for _ in self._infer(request.stop, timeout=STOP_GRACE_S, metadata=self._metadata):
                    pass
            await asyncio.wait({reading}, timeout=STOP_GRACE_S)
        reading.cancel()  # and with it the call
        await asyncio.gather(reading, return_exceptions=True)

    async def is_ready(self, within_s: float) -> bool:
        """Whether the server is there and ready, or becomes it ``within_s``."""
        until = time.monotonic() + within_s
        while (left_s := until - time.monotonic()) > 0:
            try:
                asked = self._ready(
                    pb.ServerReadyRequest(), timeout=left_s, wait_for_ready=True, metadata=self._metadata
                )
                if (await asked).ready:
                    return True
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return True  # it has no such question, but it answers
            await asyncio.sleep(_BETWEEN_QUESTIONS_S)
        return False

    async def _receive(self, call: Any, record: Record) -> None:
        final, wrong = False, None
        while (response := await call.read()) is not grpc.aio.EOF:
            try:
                final = self._take(response, record, time.monotonic_ns())
            except ClientError as error:
                wrong = wrong or error  # and on to the end: Triton (2.51) keeps what is cancelled while it ends
        if wrong:
            raise wrong
        if not final:
            raise StreamBroken(f"{self._url}: the stream ended before the last response; the answer is incomplete")

    def _take(self, response: Any, record: Record, received_ns: int) -> bool:
        """Note a response in the record; whether it was the last."""
        if response.error_message:
            raise failures.of_text(response.error_message, self._url)
        infer = response.infer_response
        record.responses.append((received_ns, _tokens(infer)))
        if record.input_tokens is None:
            record.input_tokens = _number(infer, ("num_input_tokens",))
        return bool(infer.parameters["triton_final_response"].bool_param)


class HttpSender:
    """Connections to one server for one event loop, one for each request in flight."""

    def __init__(self, endpoint: openai.HttpEndpoint) -> None:
        self._url = endpoint.url
        self._session = endpoint.session()

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def send(self, request: SerializedRequest, record: Record, deadline_s: float | None = None) -> Record:
        """Send a request now and fill in its record; raises nothing but the cancellation of its own task."""
        record.max_tokens = request.max_tokens
        record.sent_ns = time.monotonic_ns()
        try:
            await asyncio.wait_for(self._receive(request.message, record), deadline_s)
            record.outcome = OK
        except asyncio.CancelledError:
            record.outcome, record.error = Cancelled.__name__, "the run ended"
            raise
        except asyncio.TimeoutError:
            fail(record, DeadlineExceeded(f"{self._url}: no complete answer within the deadline"))
        except ClientError as error:
            fail(record, error)
        finally:
            record.ended_ns = time.monotonic_ns()
        return record

    async def is_ready(self, within_s: float) -> bool:
        """Whether a server is there that takes requests, or becomes it ``within_s``."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if await self._answers(until - time.monotonic()):
                return True
            await asyncio.sleep(_BETWEEN_QUESTIONS_S)
        return False

    async def _answers(self, timeout_s: float) -> bool:
        """The gateway says itself whether it takes requests; of another server its list of models is enough."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=timeout_s)
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            for path in (self._url.removesuffix("/v1") + "/health/ready", f"{self._url}/models"):
                async with self._session.get(path, timeout=timeout) as answer:
                    if answer.status != 404:
                        return answer.status == 200
        return False

    async def _receive(self, message: bytes, record: Record) -> None:
        counts = openai.Counts()
        async with contextlib.aclosing(openai.documents(self._session, self._url, message)) as documents:
            async for document in documents:
                self._take(document, counts, record, time.monotonic_ns())

    def _take(self, document: dict[str, Any], counts: openai.Counts, record: Record, received_ns: int) -> None:
        chunks = counts.chunks(document, received_ns, stream=True)
        record.responses += [(received_ns, chunk.token_count) for chunk in chunks]
        record.input_tokens = counts.input_tokens


def fail(record: Record, error: ClientError) -> None:
    """Note how a request ended."""
    record.outcome, record.error = type(error).__name__, str(error)


def _tokens(infer: Any) -> int | None:
    """Generated tokens in a response as the server counts them: none in the empty last one, None where it is silent."""
    return _number(infer, ("num_output_tokens", "sequence_length")) if infer.outputs else 0


def _number(infer: Any, names: Iterable[str]) -> int | None:
    for tensor, raw in zip(infer.outputs, infer.raw_output_contents, strict=False):
        if tensor.name in names:
            return int.from_bytes(raw[:4], "little", signed=True)
    return None
