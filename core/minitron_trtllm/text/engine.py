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
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from minitron_trtllm.text.tensors import Arrays, Tensors, datatype, from_bytes, to_bytes

INFER_RPC = "/inference.GRPCInferenceService/ModelStreamInfer"
DEFAULT_URL = "127.0.0.1:8001"
#: Header of an API key of ``--grpc-restricted-protocol``, by the name that 'minitron serve' gives it.
_KEY_HEADER = "triton-grpc-protocol-api-key"
#: Seconds that the engine has to end a stopped request; then its call is cancelled after all.
_STOP_GRACE_S = 30
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # the server is this one; a proxy of the environment has no say
)


class EngineError(Exception):
    """tensorrt_llm, or the way to it, answered with an error; the message is its own."""


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
            variable = "MINITRON_GRPC" if name == "url" else f"MINITRON_GRPC_{name.upper()}"
            return environment.get(variable) or parameters.get(f"grpc_{name}") or default

        return cls(**{name: one(name, default) for name, default in vars(cls()).items()})

    def channel(self) -> grpc.aio.Channel:
        """A channel of the running event loop; raises ValueError for files that cannot be."""
        if not self.ca:
            return grpc.aio.insecure_channel(self.url, options=_OPTIONS)
        ca, key, cert = (_read(path) if path else None for path in (self.ca, self.key, self.cert))
        options = [*_OPTIONS, *([("grpc.ssl_target_name_override", self.authority)] if self.authority else [])]
        return grpc.aio.secure_channel(self.url, grpc.ssl_channel_credentials(ca, key, cert), options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers of every call; raises ValueError for a key file that cannot be read."""
        if not self.api_key_file:
            return ()
        return ((_KEY_HEADER, _read(self.api_key_file).decode("ascii", "replace").strip()),)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}, needed to reach tensorrt_llm, cannot be read: {error.strerror}") from None


class EngineClient:
    """One channel to the server of the model ``name``; to be made and used in one event loop."""

    def __init__(self, name: str, address: Address) -> None:
        """Connects with the first request. Raises ValueError for files that cannot be read."""
        self._name, self._url = name, address.url
        self._metadata = address.metadata()
        self._channel = address.channel()
        self._ending: set[asyncio.Task[None]] = set()
        self._infer = self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )

    async def close(self) -> None:
        """Wait for the end of what was stopped, and close the channel."""
        if self._ending:
            await asyncio.wait(self._ending)
        await self._channel.close()

    async def generate(self, inputs: Arrays, outputs: Sequence[str], request_id: str) -> AsyncGenerator[Tensors, None]:
        """The responses to one request, the wanted ``outputs`` by name; leaving the loop ends it in the engine.

        ``request_id`` is this request's alone. Raises EngineError, whenever it comes.
        """
        arrived: asyncio.Queue[Tensors | EngineError | None] = asyncio.Queue()
        reading = asyncio.create_task(self._read(self._message(inputs, outputs, request_id), arrived))
        is_over = False
        try:
            while (response := await arrived.get()) is not None:
                if isinstance(response, EngineError):
                    raise response
                yield response
            is_over = True
        finally:
            if not is_over:
                ending = asyncio.create_task(self._stop(request_id, reading))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    async def _read(self, message: Any, arrived: asyncio.Queue[Tensors | EngineError | None]) -> None:
        """Hand on what a call answers, to its end, and then None. A task of its own: whoever leaves does not end it."""
        is_final = False
        try:
            async for response in self._infer(message, metadata=self._metadata):
                if response.error_message:
                    arrived.put_nowait(EngineError(response.error_message))
                    continue
                is_final = response.infer_response.parameters["triton_final_response"].bool_param
                if response.infer_response.outputs:
                    arrived.put_nowait(_tensors(response.infer_response))
            if not is_final:
                arrived.put_nowait(EngineError(f"{self._name} ended the stream before its last response"))
        except grpc.RpcError as error:
            arrived.put_nowait(EngineError(self._said(error)))
        except ValueError as error:
            arrived.put_nowait(EngineError(f"{self._name} sent a broken response ({error})"))
        arrived.put_nowait(None)

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
        for name, array in inputs.items():
            message.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
            message.raw_input_contents.append(to_bytes(array))
        for name in outputs:
            message.outputs.add(name=name)
        return message

    def _said(self, error: grpc.RpcError) -> str:
        if error.code() is grpc.StatusCode.UNAVAILABLE and "restricted" not in str(error.details()):
            return (
                f"{self._name} cannot be reached at {self._url} ({error.details()}); MINITRON_GRPC in the server's "
                "environment, or the parameter grpc_url, says where the server itself listens"
            )
        return str(error.details() or error.code().name)


def _tensors(infer: Any) -> Tensors:
    return {
        output.name: from_bytes(output.datatype, tuple(output.shape), raw)
        for output, raw in zip(infer.outputs, infer.raw_output_contents, strict=True)
    }
