"""``tensorrt_llm`` over gRPC: each request is one ModelStreamInfer call.

Over the server's own front door and not over its Python API (``InferenceRequest.exec``), because several decoupled
requests in one process deadlock there (Triton 2.51 and its main branch of July 2026), an error behind the first
response gets lost, and a caller that leaves cannot cancel. Protocol: ``grpc_service.proto`` of KServe v2 with Triton's
streaming extension; ``triton_enable_empty_final_response`` makes the last message of a request known.

A request is ended by TensorRT-LLM's own ``stop`` request with its id, and its call read to the end. The call is not
cancelled: Triton's handler of gRPC streams was seen to crash under cancelled ones (2.51; the same code on its main
branch of August 2026).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from minitron.text import credentials, trace_context
from minitron.text.channel import API_KEY, DEFAULT_URL, INFER_RPC, KEEPALIVE_S, key_header, options
from minitron.text.tensors import Arrays, Tensors, add_inputs, unpacked

READY_RPC = "/inference.GRPCInferenceService/ModelReady"
#: Seconds that the engine has to end a stopped request; then its call is cancelled after all.
_STOP_GRACE_S = 30


def _variable(field: str) -> str:
    return "MINITRON_GRPC" if field == "url" else f"MINITRON_GRPC_{field.upper()}"


def _named_in_a_model(field: str) -> str:
    """How a model of a server is told that field of its Address."""
    return f"{_variable(field)} in the server's environment, or the parameter grpc_{field},"


class EngineCallError(Exception):
    """tensorrt_llm, or the way to it, answered with an error; the message is its own."""


class EngineUnreachable(EngineCallError):
    """No server answered; the message says where it was looked for."""


@dataclass(frozen=True)
class Address:
    """Where the engine's server listens, and what it demands: paths of PEM files for TLS (``ca``) and mutual TLS
    (``cert``, ``key``), the name in its certificate where that is not the host of ``url``, and a file with an API key.
    """

    url: str = DEFAULT_URL
    ca: str = ""
    cert: str = ""
    key: str = ""
    authority: str = ""
    api_key_file: str = ""

    @classmethod
    def of(cls, parameters: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> Address:
        """From the environment, as 'minitron serve' hands it over (MINITRON_GRPC, MINITRON_GRPC_CA …), else from a
        model's parameters (grpc_url, grpc_ca …), else the default."""

        def one(name: str, default: str) -> str:
            return environment.get(_variable(name)) or parameters.get(f"grpc_{name}") or default

        return cls(**{name: one(name, default) for name, default in vars(cls()).items()})

    def check(self) -> None:
        """Raise ValueError for files that cannot be, before there is a channel to make."""
        self._credentials()
        self.metadata()

    def channel(self) -> grpc.aio.Channel:
        """A channel of the running event loop; raises ValueError for files that cannot be."""
        return self._channel(grpc.aio.insecure_channel, grpc.aio.secure_channel)

    def blocking_channel(self) -> grpc.Channel:
        """A channel for a program without an event loop; raises ValueError for files that cannot be."""
        return self._channel(grpc.insecure_channel, grpc.secure_channel)

    def _channel(self, insecure: Any, secure: Any) -> Any:
        # Its server is this one or near, so a proxy has no say. It is asked for its readiness, or for a stream, more
        # often than every KEEPALIVE_S, so any server takes these pings.
        chosen: tuple[tuple[str, Any], ...] = options(self.url, KEEPALIVE_S, proxies=False)
        proof = self._credentials()
        if proof is None:
            return insecure(self.url, options=chosen)
        if self.authority:
            chosen += (("grpc.ssl_target_name_override", self.authority),)
        return secure(self.url, grpc.ssl_channel_credentials(*proof), options=chosen)

    def _credentials(self) -> credentials.Pem | None:
        """None without TLS."""
        if not self.ca and (ours := self.cert or self.key):
            raise ValueError(f"{ours} is for TLS, and the certificate of the server's authority is not given")
        return credentials.pem(self.ca, self.cert, self.key) if self.ca else None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers of every call; raises ValueError for a key file that cannot be."""
        return ((key_header(API_KEY), credentials.api_key(self.api_key_file)),) if self.api_key_file else ()


class EngineClient:
    """One channel to the server of the model ``name``; to be made and used in one event loop."""

    def __init__(self, name: str, address: Address, *, named: Callable[[str], str] = _named_in_a_model) -> None:
        """Connects with the first request; ``named`` says what gives a field of ``address``, for the errors about it.

        Raises ValueError for files that cannot be.
        """
        self._name, self._address, self._named = name, address, named
        self._metadata = address.metadata()
        self._channel = address.channel()
        self._ending: set[asyncio.Task[None]] = set()
        self._model_ready = self._channel.unary_unary(
            READY_RPC, pb.ModelReadyRequest.SerializeToString, pb.ModelReadyResponse.FromString
        )
        self._infer = self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )

    async def close(self) -> None:
        """Wait for the end of what was stopped, and close the channel."""
        if self._ending:
            await asyncio.wait(self._ending)
        await self._channel.close()

    async def is_ready(self, timeout_s: float) -> bool | None:
        """Whether the server takes requests for the model; None where it does not say in time."""
        request = pb.ModelReadyRequest(name=self._name)
        try:
            return bool((await self._model_ready(request, metadata=self._metadata, timeout=timeout_s)).ready)
        except grpc.RpcError as error:
            return None if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else False

    async def is_silent(self, within_s: float) -> bool:
        """Whether the server leaves a gRPC stream without any answer; it is asked for a model that it has not."""
        try:
            async for _ in self._infer(pb.ModelInferRequest(), metadata=self._metadata, timeout=within_s):
                pass
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return False

    async def batches(
        self, inputs: Arrays, outputs: Sequence[str], request_id: str
    ) -> AsyncGenerator[list[Tensors], None]:
        """The responses to one request, the wanted ``outputs`` by name, each time all that have come meanwhile.

        Leaving the loop ends the request in the engine. ``request_id`` is this request's alone. It goes out with the
        headers of ``trace_context.CURRENT``. Raises EngineCallError, whenever it comes.
        """
        arrived = _Arrivals()
        reading = asyncio.create_task(self._read(self._message(inputs, outputs, request_id), arrived))
        try:
            while batch := await arrived.take():
                yield batch
        finally:
            if not arrived.is_over:
                ending = asyncio.create_task(self._stop(request_id, reading))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    async def _read(self, message: Any, arrived: _Arrivals) -> None:
        """Hand on what a call answers, to its end. A task of its own: whoever leaves does not end it."""
        is_final = False
        try:
            metadata = self._metadata + trace_context.for_triton(trace_context.CURRENT.get())
            async for response in self._infer(message, metadata=metadata):
                if response.error_message:
                    arrived.fail(EngineCallError(response.error_message))
                    continue
                is_final = response.infer_response.parameters["triton_final_response"].bool_param
                if response.infer_response.outputs:
                    infer = response.infer_response
                    arrived.put(unpacked(infer.outputs, infer.raw_output_contents))
            if not is_final:
                arrived.fail(EngineCallError(f"{self._name} ended the stream before its last response"))
        except grpc.RpcError as error:
            arrived.fail(self._meant(error))
        except ValueError as error:
            arrived.fail(EngineCallError(f"{self._name} sent a broken response ({error})"))
        arrived.end()

    async def _stop(self, request_id: str, reading: asyncio.Task[None]) -> None:
        """End a request, again until it has ended: a ``stop`` can overtake what it is to stop."""
        one = np.ones((1, 1), np.int32)  # the three are only there to be present
        inputs = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}
        message = self._message(inputs, ("output_ids", "sequence_length"), request_id)
        for _ in range(_STOP_GRACE_S):
            try:
                async for _ in self._infer(message, metadata=self._metadata):
                    pass
            except grpc.RpcError:
                pass  # a stopping server takes no request; what runs ends by itself
            await asyncio.wait({reading}, timeout=1)
            if reading.done():
                return
        reading.cancel()

    def _message(self, inputs: Arrays, outputs: Sequence[str], request_id: str) -> Any:
        message = pb.ModelInferRequest(model_name=self._name, id=request_id)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        add_inputs(message, inputs)
        for name in outputs:
            message.outputs.add(name=name)
        return message

    def _meant(self, error: grpc.RpcError) -> EngineCallError:
        said = str(error.details() or error.code().name)
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return EngineCallError(said)
        if "restricted" in said:
            return EngineCallError(f"{said}; {self._named('api_key_file')} names the file of the key that is sent")
        what_to_do = f"{self._named('url')} says where it listens"
        if "refused" not in said:  # TLS that does not fit can be a handshake that failed, or just a socket that closed
            what_to_do += f"; where it speaks TLS, {self._named('ca')} names the authority of its certificate"
        return EngineUnreachable(f"{self._name} cannot be reached at {self._address.url} ({said}); {what_to_do}")


class _Arrivals:
    """What a call has answered and nobody has taken yet."""

    def __init__(self) -> None:
        self._there: list[Tensors] = []
        self._error: EngineCallError | None = None
        self._changed = asyncio.Event()
        self.is_over = False

    def put(self, response: Tensors) -> None:
        """A response came."""
        self._there.append(response)
        self._changed.set()

    def fail(self, error: EngineCallError) -> None:
        """An error came; the first one counts."""
        self._error = self._error or error
        self._changed.set()

    def end(self) -> None:
        """Nothing comes any more."""
        self.is_over = True
        self._changed.set()

    async def take(self) -> list[Tensors]:
        """All that is there, as soon as there is something; nothing at the end. Raises the error behind what came."""
        while not (self._there or self._error or self.is_over):
            self._changed.clear()
            await self._changed.wait()
        if not self._there and self._error:
            raise self._error
        there, self._there = self._there, []
        return there
