"""The client for asyncio, for hundreds of streams at once. The blocking one is this one, run in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from minitron import failures
from minitron.errors import ClientError, DeadlineExceeded, NotReady, UsageError
from minitron.text.channel import DEFAULT_URL, INFER_RPC, PATIENT_KEEPALIVE_S
from minitron_client.client import dialect
from minitron_client.client.answer import STOP_GRACE_S, Response
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import ApiKey, Deadline, Endpoint, Retry, Tls
from minitron_client.client.local_text import LocalText
from minitron_client.client.request import Request
from minitron_client.client.stream import AsyncStream

log = logging.getLogger(__name__)

#: Clients that had a connection. gRPC does not survive a fork with one of grpc.aio open: it would crash the child.
_CONNECTED: weakref.WeakSet[AsyncClient] = weakref.WeakSet()
_torn = False


def any_connected() -> bool:
    """Whether a client of this process has a connection open."""
    return any(client._opened is not None for client in _CONNECTED)


def _after_fork_in_child() -> None:
    global _torn  # noqa: PLW0603 (of the process, as gRPC's own state is)
    _torn = _torn or any_connected()
    _CONNECTED.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


class AsyncClient:
    """A connection to one server for one event loop. Use it in an ``async with`` block, or close it.

    ``model``: the model that takes the requests; None finds tensorrt_llm_bls, else ensemble, else tensorrt_llm.
    ``deadline_s``: for each request unless it says otherwise, retries included; None waits for ever.
    ``keepalive_s``: how often a silent server is asked whether it lives (see ``Endpoint``). ``url`` may be an Endpoint,
    which says how to connect by itself.
    ``tokenizer``: the served tokenizer's folder; text is then made here, over tensorrt_llm, without the text model.

    Every method that talks to the server may raise a ClientError: NotReady, Rejected, InvalidRequest,
    DeadlineExceeded, StreamBroken, Cancelled.
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
        self._endpoint = Endpoint.of(url, tls, api_key, keepalive_s)
        self._model, self._deadline_s, self._retry = model, deadline_s, retry or Retry()
        self._tokenizer = None if tokenizer is None else Path(tokenizer)
        self._metadata = self._endpoint.metadata
        if self._endpoint.tls:
            self._endpoint.tls.credentials()  # a file that is not there is named here, not with the first request
        self._models: dict[str | None, ServedModel] = {}
        self._finding = asyncio.Lock()
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._leaving: set[asyncio.Task[None]] = set()
        self._opened: Any = None
        self._closed = False

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
        self._closed = True
        await self._disconnect()

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
        return await self._yes("ServerLive", pb.ServerLiveRequest(), "live")

    async def is_ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return await self._yes("ServerReady", pb.ServerReadyRequest(), "ready")

    async def is_model_ready(self, name: str) -> bool:
        """Whether one model is ready."""
        return await self._yes("ModelReady", pb.ModelReadyRequest(name=name), "ready")

    async def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return _plain(await self._ask("ServerMetadata", pb.ServerMetadataRequest()))

    async def model_metadata(self, model: str | None = None) -> dict[str, Any]:
        """Versions, inputs and outputs of a model."""
        name = model or (await self.served_model()).name
        return _plain(await self._ask("ModelMetadata", pb.ModelMetadataRequest(name=name)))

    async def config(self, model: str | None = None) -> dict[str, Any]:
        """A model's config as the server completed it."""
        return _plain(await self._config(model or (await self.served_model()).name))

    async def statistics(self, model: str | None = None) -> list[dict[str, Any]]:
        """Counts and durations of a model, for each version."""
        name = model or (await self.served_model()).name
        answer = await self._ask("ModelStatistics", pb.ModelStatisticsRequest(name=name))
        return [_plain(one) for one in answer.model_stats]

    async def served_model(self, name: str | None = None, *, deadline_s: float | None = None) -> ServedModel:
        """What the client knows of a model (None: the one that takes the requests): its dialect and its inputs."""
        return await self._served_model(name, Deadline(deadline_s))

    async def _served_model(self, name: str | None, deadline: Deadline) -> ServedModel:
        name = name or self._model
        if name not in self._models:
            try:  # streams that begin together: a tokenizer is loaded once, and not while it is loaded
                await asyncio.wait_for(self._finding.acquire(), deadline.left_s)
            except asyncio.TimeoutError:
                raise DeadlineExceeded(f"{self._endpoint.url}: no answer about the model within the deadline") from None
            try:
                if name not in self._models:
                    found = await self._find_model(name, deadline)
                    self._models[name] = self._models[found.name] = found
                    return found
            finally:
                self._finding.release()
        return self._models[name]

    async def _find_model(self, name: str | None, deadline: Deadline) -> ServedModel:
        """Ask what must be known of a model (None: the best front there is) before it can be sent requests."""
        config = await self._config(name or await self._best_front(deadline), deadline)
        engine = dialect.engine_step(config)
        found = dialect.served_model(config, await self._config(engine, deadline) if engine else config)
        if self._tokenizer is None:
            return found
        limits = {}
        if await self._is_model_ready(dialect.FRONTS[0], deadline):
            text_model = await self._config(dialect.FRONTS[0], deadline)
            limits = {key: value.string_value for key, value in text_model.parameters.items()}
        return dialect.with_local_text(found, await asyncio.to_thread(LocalText, self._tokenizer, limits))

    async def _best_front(self, deadline: Deadline) -> str:
        for front in dialect.FRONTS if self._tokenizer is None else dialect.FRONTS[-1:]:
            if await self._is_model_ready(front, deadline):
                return front
        raise NotReady(
            f"{self._endpoint.url}: none of the models {', '.join(dialect.FRONTS)} is ready; wait, or name another "
            "(--model)"
        )

    async def _is_model_ready(self, name: str, deadline: Deadline) -> bool:
        return bool((await self._ask("ModelReady", pb.ModelReadyRequest(name=name), deadline)).ready)

    async def _config(self, name: str, deadline: Deadline | None = None) -> Any:
        return (await self._ask("ModelConfig", pb.ModelConfigRequest(name=name), deadline)).config

    async def _ask(self, rpc: str, message: Any, deadline: Deadline | None = None) -> Any:
        """Call a method of ``inference.GRPCInferenceService``; its answer."""
        call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(self._channel), rpc)
        try:
            return await call(message, timeout=(deadline or Deadline(None)).question_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise failures.of_status(error, self._endpoint.url) from None

    async def _yes(self, rpc: str, message: Any, field: str) -> bool:
        try:
            return bool(getattr(await self._ask(rpc, message), field))
        except (NotReady, DeadlineExceeded):
            return False

    async def _disconnect(self) -> None:
        """Close the connection; one that is not closed for good opens another with its next request."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.close()

    @property
    def _idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._leaving and not any(stream.in_flight for stream in self._streams)

    @property
    def _channel(self) -> grpc.aio.Channel:
        """The channel; made on first use, because it belongs to the event loop that runs then."""
        if self._closed:
            raise UsageError("this client is closed; make another")
        if _torn:
            raise ClientError(
                "this process was forked while a client was connected and in use, which gRPC does not survive; fork "
                "before, or start processes with 'spawn'"
            )
        if self._opened is None:
            self._opened = self._endpoint.aio_channel()
            _CONNECTED.add(self)
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


def _plain(message: Any) -> dict[str, Any]:
    """A protobuf message as JSON values, under its own field names (64-bit numbers become strings)."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))
