"""What the gateway must know of the model behind it: the text model's parameters, and its tokenizer.

They stand in the ``config.pbtxt`` of ``tensorrt_llm_bls``, which a server hands out (ModelConfig of KServe v2 with
Triton's extension) and a rendered repository holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from minitron import failures
from minitron.errors import InputError, InvalidRequest, NotReady, RepositoryError
from minitron.text.engine import Address

TEXT_MODEL = "tensorrt_llm_bls"
_CONFIG_RPC = "/inference.GRPCInferenceService/ModelConfig"
_NEEDED = ("tensorrt_llm_model_name", "max_input_len", "max_seq_len", "vocab_size")
_TRY_EVERY_S = 0.2
_ANSWER_S = 5.0


def of_repository(folder: Path) -> tuple[dict[str, str], Path]:
    """Parameters and tokenizer folder of a rendered repository; raises RepositoryError."""
    path = folder / TEXT_MODEL / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except FileNotFoundError:
        raise RepositoryError(f"{folder} has no {TEXT_MODEL}/config.pbtxt; 'minitron render' writes it") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} is no config of Triton: {error}") from error
    return _parameters(config, str(path)), folder / "tokenizer"


def of_servers(addresses: Sequence[Address], wait_s: float) -> tuple[dict[str, str], Path]:
    """The same of the first server that answers within ``wait_s``; its folder may be one of another machine.

    Raises NotReady, and ClientError for a server that refuses to tell.
    """
    until = time.monotonic() + wait_s
    while True:
        for address in addresses:
            try:
                parameters = _parameters(_ask(address), address.url)
                return parameters, Path(parameters.get("tokenizer_dir", ""))
            except NotReady as error:
                last = error
        if time.monotonic() > until:
            raise last
        time.sleep(_TRY_EVERY_S)


def _ask(address: Address) -> Any:
    with address.blocking_channel() as channel:
        ask = channel.unary_unary(
            _CONFIG_RPC, pb.ModelConfigRequest.SerializeToString, pb.ModelConfigResponse.FromString
        )
        try:
            request = pb.ModelConfigRequest(name=TEXT_MODEL)
            return ask(request, metadata=address.metadata(), timeout=_ANSWER_S).config
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise NotReady(f"{address.url} does not answer; check --upstream, and TLS on both sides") from None
            known = failures.of_status(error, address.url, proxies=False)
            if isinstance(known, InvalidRequest) and "restricted" in str(known):
                raise InvalidRequest(f"{known} (--upstream-api-key-file names its file)") from None
            raise known from None


def _parameters(config: Any, where: str) -> dict[str, str]:
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    if missing := [name for name in _NEEDED if not parameters.get(name)]:
        raise InputError(
            f"{TEXT_MODEL} of {where} has no parameter {missing[0]}; a repository of 'minitron render' has it"
        )
    return parameters
