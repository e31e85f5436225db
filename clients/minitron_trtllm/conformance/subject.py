"""The server under test: asked by raw tensors, so that a wrong request reaches it too."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb

from minitron_trtllm import manifest
from minitron_trtllm.client.blocking import Client
from minitron_trtllm.client.endpoint import INFER_RPC, Endpoint
from minitron_trtllm.client.tensors import pack, unpack
from minitron_trtllm.errors import InputError, MissingDependency
from minitron_trtllm.prometheus import Metrics

ENGINE, FRONT = "tensorrt_llm", "tensorrt_llm_bls"
OPENVINO, TENSORRT = "OpenVINO", "TensorRT-LLM"
_PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and void"
_NUMPY = {"INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32, "FP16": np.float16,
          "BOOL": np.bool_}  # fmt: skip
_DEADLINE_S = 300.0
_GREEDY_TOKENS = 24

Tensor = npt.NDArray[Any]


class Disagreement(Exception):
    """The server does otherwise than documented."""


class NotApplicable(Exception):
    """This server cannot show it, and why."""


@dataclass(frozen=True)
class Limits:
    """What the engine was built for, in tokens and sequences."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int


@dataclass
class Answer:
    """All responses with outputs, in order, and the error where there was one.

    ``finals``: the final flag of every response, those without outputs too.
    """

    responses: list[dict[str, Tensor]] = field(default_factory=list)
    error: str | None = None
    finals: list[bool] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """The ``output_ids`` of all responses, one after the other."""
        return [int(token) for one in self.responses for token in one["output_ids"].reshape(-1)]

    @property
    def text(self) -> str:
        """The ``text_output`` of all responses, one after the other."""
        return "".join(one["text_output"].reshape(-1)[0] for one in self.responses)


class Call(Iterator[tuple[dict[str, Tensor], bool]]):
    """A request on its way; iterating gives outputs and final flag of each response, and raises RefusedByServer."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> tuple[dict[str, Tensor], bool]:
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            raise RefusedByServer(error.details() or str(error.code())) from None
        if message.error_message:
            raise RefusedByServer(message.error_message)
        infer = message.infer_response
        raw = zip(infer.outputs, infer.raw_output_contents, strict=True)
        outputs = {tensor.name: _array(tensor, content) for tensor, content in raw}
        return outputs, infer.parameters["triton_final_response"].bool_param

    def cancel(self) -> None:
        """Go away, as a client that is closed does."""
        self._call.cancel()


class RefusedByServer(Exception):
    """The server answered a request with an error; its text."""


class Subject:
    """One server and what must be known of it beforehand; a context manager.

    ``engine``: OPENVINO or TENSORRT. ``queue_limit``: 0 where there is none. ``metrics_url``: host:port, or None.
    """

    def __init__(
        self, endpoint: Endpoint, *, engine: str, limits: Limits, tokenizer: Path, metrics_url: str | None = None
    ) -> None:
        self.engine, self.limits, self._metrics_url = engine, limits, metrics_url
        self._client = Client(endpoint.url, model=ENGINE, tls=endpoint.tls, api_key=endpoint.api_key)
        self._channel, self._metadata = endpoint.channel(), endpoint.metadata
        self._infer = self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        self._tokenizer = _tokenizer(tokenizer)

    @classmethod
    def of_repository(cls, endpoint: Endpoint, repository: Path, metrics_url: str | None) -> Subject:
        """The server of a rendered repository (or of one like it elsewhere); raises InputError."""
        details = manifest.read(repository / "engine", "engine").details
        names = ("max_batch_size", "max_input_len", "max_seq_len")
        limits = Limits(**{name: details["limits"][name] for name in names}, vocab_size=details["vocab_size"])
        engine = TENSORRT if details.get("tensorrt_llm") else OPENVINO
        return cls(endpoint, engine=engine, limits=limits, tokenizer=repository / "tokenizer", metrics_url=metrics_url)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._channel.close()

    @cached_property
    def prompt(self) -> list[int]:
        """Token ids of a prompt that any engine takes."""
        ids = list(self._tokenizer.encode(_PROMPT, add_special_tokens=False).ids)
        return ids[: max(1, min(len(ids), self.limits.max_input_len // 2))]

    @cached_property
    def greedy(self) -> list[int]:
        """What the engine continues ``prompt`` with, whole and without an end."""
        answer = self.ask(self.request(_GREEDY_TOKENS))
        if len(answer.token_ids) != _GREEDY_TOKENS:
            raise Disagreement(f"{_GREEDY_TOKENS} tokens were asked for: {answer.error or len(answer.token_ids)}")
        return answer.token_ids

    @cached_property
    def queue_limit(self) -> int:
        """Requests that may wait in the engine: the CPU engine's parameter, the queue policy for the C++ backend."""
        config = self._client.config(ENGINE)
        if self.engine == OPENVINO:
            return int(config["parameters"]["max_queue_size"]["string_value"])
        batching = config.get("dynamic_batching") or {}
        return int((batching.get("default_queue_policy") or {}).get("max_queue_size") or 0)

    @cached_property
    def room(self) -> int:
        """The longest answer that ``prompt`` can have."""
        return self.limits.max_seq_len - len(self.prompt)

    def request(self, output_len: int, prompt: Sequence[int] | None = None, /, **more: Any) -> dict[str, Any]:
        """The tensors of a plain request to the engine's model: whole, no prompt; ``more`` replaces and adds."""
        ids = self.prompt if prompt is None else prompt
        return {"input_ids": np.array([ids], np.int32), "input_lengths": len(ids), "request_output_len": output_len,
                "exclude_input_in_output": True, **more}  # fmt: skip

    def open(self, tensors: Mapping[str, Any], *, model: str = ENGINE, request_id: str | None = None) -> Call:
        """Send a request; a scalar becomes [1, 1], a list [1, n], an array stays as it is."""
        inputs = self._client.served_model(model).inputs
        message = pb.ModelInferRequest(model_name=model, id=uuid.uuid4().hex if request_id is None else request_id)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, value in tensors.items():
            if name not in inputs:
                raise NotApplicable(f"model {model} has no input {name}")
            shape, flat = _shaped(value)
            message.inputs.add(name=name, datatype=inputs[name], shape=shape)
            message.raw_input_contents.append(pack(inputs[name], flat))
        return Call(self._infer(message, timeout=_DEADLINE_S, metadata=self._metadata))

    def ask(self, tensors: Mapping[str, Any], *, model: str = ENGINE, request_id: str | None = None) -> Answer:
        """Send a request and wait for all of its answer."""
        return collect(self.open(tensors, model=model, request_id=request_id))

    def steps(self) -> float:
        """How many steps the engine counts; raises NotApplicable."""
        if self._metrics_url is None:
            raise NotApplicable("the server's metrics were not given (--metrics-url)")
        count = Metrics.read(self._metrics_url).sum("nv_trt_llm_general_metrics", general_type="iteration_counter")
        if count is None:
            raise NotApplicable("the server does not count the engine's steps")
        return count


def collect(call: Call) -> Answer:
    """All that still comes of a request."""
    answer = Answer()
    with contextlib.suppress(StopIteration):
        while True:
            try:
                outputs, final = next(call)
                answer.finals.append(final)
            except RefusedByServer as error:
                answer.error = str(error)
                break
            if outputs:
                answer.responses.append(outputs)
    return answer


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll until it holds; raises Disagreement."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise Disagreement(f"{what} within {timeout_s:g} s did not happen")
        time.sleep(0.05)


def _shaped(value: Any) -> tuple[list[int], list[Any]]:
    if isinstance(value, np.ndarray):
        return list(value.shape), value.reshape(-1).tolist()
    if isinstance(value, list):
        return [1, len(value)], value
    return [1, 1], [value]


def _array(tensor: Any, content: bytes) -> Tensor:
    flat = unpack(tensor.datatype, content)
    return np.array(flat, _NUMPY.get(tensor.datatype, object)).reshape(list(tensor.shape))


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise MissingDependency("the package 'tokenizers' is needed; pip install tokenizers") from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is not there; give the repository that is served")
    return Tokenizer.from_file(str(path))
