"""``tensorrt_llm`` over gRPC: each request is one ModelStreamInfer call, whose cancel is the engine's cancel.

Over the server's own front door and not over its Python API (``InferenceRequest.exec``), because several decoupled
requests in one process deadlock there (Triton 2.51 and its main branch of July 2026), an error behind the first
response gets lost, and a caller that leaves cannot cancel. Protocol: ``grpc_service.proto`` of KServe v2 with Triton's
streaming extension; ``triton_enable_empty_final_response`` makes the last message of a request known.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from .tensors import Arrays, Tensors, datatype, from_bytes, to_bytes

INFER_RPC = "/inference.GRPCInferenceService/ModelStreamInfer"
DEFAULT_URL = "127.0.0.1:8001"
#: Header of an API key of ``--grpc-restricted-protocol``, by the name that 'minitron serve' gives it.
_KEY_HEADER = "triton-grpc-protocol-api-key"
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
        self._infer = self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )

    async def close(self) -> None:
        """End what is in flight and close the channel."""
        await self._channel.close()

    async def generate(
        self, inputs: Arrays, outputs: Sequence[str], request_id: str = ""
    ) -> AsyncGenerator[Tensors, None]:
        """The responses to one request, the wanted ``outputs`` by name; leaving the loop cancels it in the engine.

        Raises EngineError, whenever it comes.
        """
        call = self._infer(self._message(inputs, outputs, request_id), metadata=self._metadata)
        is_final = False
        try:
            async for response in call:  # to its end: a call that ended by itself is not cancelled
                if response.error_message:
                    raise EngineError(response.error_message)
                infer = response.infer_response
                is_final = infer.parameters["triton_final_response"].bool_param
                if infer.outputs:
                    yield _tensors(infer)
        except grpc.RpcError as error:
            raise EngineError(self._said(error)) from None
        finally:
            call.cancel()  # nothing happens where it is over
        if not is_final:
            raise EngineError(f"{self._name} ended the stream before its last response")

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
