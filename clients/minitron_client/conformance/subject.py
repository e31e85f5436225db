"""The server under test: asked by raw tensors, so that a wrong request reaches it too."""

from __future__ import annotations

import queue
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
from tritonclient.grpc import service_pb2_grpc

from minitron.artifacts import manifest
from minitron.model import runtime_limits, tokenizer_files
from minitron.prometheus import Metrics
from minitron.text import end_ids
from minitron_client.client.blocking import Client
from minitron_client.client.endpoint import Endpoint
from minitron_client.client.tensors import pack, unpack
from minitron_client.conformance.generate import Events

ENGINE, TEXT_MODEL, ENSEMBLE = "tensorrt_llm", "tensorrt_llm_bls", "ensemble"
OPENVINO, TENSORRT = "OpenVINO", "TensorRT-LLM"
PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and void"
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
    max_num_tokens: int


@dataclass(frozen=True)
class Message:
    """One message of the server about the request ``id``: outputs, or an error; ``final``: the last about it."""

    id: str
    outputs: dict[str, Tensor]
    error: str | None
    final: bool


@dataclass
class Answer:
    """What was said to a request: outputs in their order, and the error where there was one.

    ``finals``: the final flag of every message, those without outputs too.
    """

    responses: list[dict[str, Tensor]] = field(default_factory=list)
    error: str | None = None
    finals: list[bool] = field(default_factory=list)

    def take(self, message: Message) -> None:
        """Note a message."""
        self.finals.append(message.final)
        self.error = self.error or message.error
        if message.outputs:
            self.responses.append(message.outputs)

    @property
    def token_ids(self) -> list[int]:
        """The ``output_ids`` of all responses, one after the other."""
        return [int(token) for one in self.responses for token in one["output_ids"].reshape(-1)]

    @property
    def text(self) -> str:
        """The ``text_output`` of all responses, one after the other."""
        return "".join(one["text_output"].reshape(-1)[0] for one in self.responses)

    def check_whole(self) -> None:
        """Raise Disagreement unless the last message, error or not, is marked as such, and no other."""
        if self.finals.count(True) != 1 or not self.finals[-1]:
            raise Disagreement(
                f"of {len(self.finals)} messages, {self.finals.count(True)} are marked as the last one"
                + (f"; the error was {self.error!r}" if self.error else "")
            )


class Call(Iterator[Message]):
    """A gRPC stream to the server, with one request on it or several: what it says is in its own order.

    Iterating gives the messages, and raises RefusedByServer where the stream itself breaks.
    """

    def __init__(self, infer: Any, serialize: Callable[..., Any], metadata: Any, deadline_s: float) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._serialize = serialize
        self._call = infer(iter(self._requests.get, None), timeout=deadline_s, metadata=metadata)

    def send(self, tensors: Mapping[str, Any], *, model: str = ENGINE, request_id: str | None = None) -> str:
        """Send a request (see ``Subject.open``); returns its id."""
        message = self._serialize(tensors, model, uuid.uuid4().hex if request_id is None else request_id)
        self._requests.put(message)
        return str(message.id)

    def __next__(self) -> Message:
        try:
            said = next(self._call)
        except grpc.RpcError as error:
            raise RefusedByServer(error.details() or str(error.code())) from None
        infer = said.infer_response
        raw = zip(infer.outputs, infer.raw_output_contents, strict=True)
        outputs = {tensor.name: _array(tensor, content) for tensor, content in raw}
        final = infer.parameters["triton_final_response"].bool_param
        return Message(infer.id, outputs, said.error_message or None, final)

    def to_the_end(self) -> Iterator[Message]:
        """All that still comes; no more is sent, so that the stream ends with the last request on it."""
        self._requests.put(None)
        return self

    def rest(self) -> Answer:
        """``to_the_end`` as one answer; a stream that breaks is an error without a message."""
        answer = Answer()
        try:
            for message in self.to_the_end():
                answer.take(message)
        except RefusedByServer as error:
            answer.error = answer.error or str(error)
        return answer

    def cancel(self) -> None:
        """Go away, as a client that is closed does."""
        self._call.cancel()
        self._requests.put(None)


class RefusedByServer(Exception):
    """A stream was ended by the server, or a request on it that had to be answered; its text."""


class Subject:
    """One server and what must be known of it beforehand; a context manager.

    ``engine``: OPENVINO or TENSORRT. ``metrics_url``, ``http_url``: host:port, or None.
    """

    def __init__(
        self, endpoint: Endpoint, *, engine: str, limits: Limits, tokenizer: Path, metrics_url: str | None = None,
        http_url: str | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.limits, self._metrics_url, self.http_url = engine, limits, metrics_url, http_url
        self._headers = {endpoint.api_key.name: endpoint.api_key.value} if endpoint.api_key else {}
        self._client = Client(endpoint, model=ENGINE)
        self._channel, self._metadata = endpoint.channel(), endpoint.metadata
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelStreamInfer
        self._folder, (self._tokenizer, _) = tokenizer, tokenizer_files.opened(tokenizer)

    @classmethod
    def of_repository(
        cls, endpoint: Endpoint, repository: Path, metrics_url: str | None = None, http_url: str | None = None
    ) -> Subject:
        """The server of a rendered repository (or of one like it elsewhere); raises InputError."""
        details = manifest.read(repository / "engine", "engine").details
        names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
        limits = Limits(**{name: details["limits"][name] for name in names}, vocab_size=details["vocab_size"])
        engine = TENSORRT if details.get("tensorrt_llm") else OPENVINO
        return cls(endpoint, engine=engine, limits=limits, tokenizer=repository / "tokenizer", metrics_url=metrics_url,
                   http_url=http_url)  # fmt: skip

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._channel.close()

    @cached_property
    def prompt(self) -> list[int]:
        """Token ids of a prompt that any engine takes."""
        ids = list(self._tokenizer.encode(PROMPT, add_special_tokens=False).ids)
        return ids[: max(1, min(len(ids), self.limits.max_input_len // 2))]

    def prompt_of(self, length: int) -> list[int]:
        """Token ids of a prompt of so many tokens: that one again and again."""
        return (self.prompt * (length // len(self.prompt) + 1))[:length]

    @cached_property
    def greedy(self) -> list[int]:
        """What the engine continues ``prompt`` with, whole and without an end."""
        answer = self.ask(self.request(_GREEDY_TOKENS))
        if len(answer.token_ids) != _GREEDY_TOKENS:
            raise Disagreement(f"{_GREEDY_TOKENS} tokens were asked for: {answer.error or len(answer.token_ids)}")
        return answer.token_ids

    @cached_property
    def models(self) -> frozenset[str]:
        """Those of the three that take requests that are served."""
        return frozenset(name for name in (ENGINE, TEXT_MODEL, ENSEMBLE) if self._client.is_model_ready(name))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: those of generation_config.json, else the tokenizer's."""
        return end_ids.of_model(self._folder)

    @cached_property
    def _adds_special(self) -> bool:
        value = (self._parameters(TEXT_MODEL) or self._parameters("preprocessing")).get("add_special_tokens", "true")
        return value.lower() in ("true", "1")

    def _parameters(self, model: str) -> dict[str, str]:
        if not self._client.is_model_ready(model):
            return {}
        found = self._client.config(model).get("parameters") or {}
        return {name: value.get("string_value", "") for name, value in found.items()}

    def encode(self, text: str) -> list[int]:
        """Its ids as the text models make them."""
        return list(self._tokenizer.encode(text, add_special_tokens=self._adds_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    @cached_property
    def queue_limit(self) -> int:
        """How many may wait in the engine, 0 = any number: the CPU engine reads it among its model's parameters, the
        C++ backend's executor takes it from Triton's queue policy alone (model_instance_state.cc).
        """
        batching = self._client.config(ENGINE).get("dynamic_batching") or {}
        policy = (batching.get("default_queue_policy") or {}).get("max_queue_size")
        own = self._parameters(ENGINE).get("max_queue_size") if self.engine == OPENVINO else None
        return int(policy or own or 0)

    @cached_property
    def longest_prompt(self) -> int:
        """What the engine itself takes: the CPU engine its max_input_len, TensorRT-LLM what its runtime makes of it."""
        if self.engine == OPENVINO:
            return self.limits.max_input_len
        chunked = self._parameters(ENGINE).get("enable_chunked_context", "false").lower() in ("true", "1")
        return runtime_limits.longest_prompt(
            self.limits.max_seq_len, self.limits.max_num_tokens, chunked_context=chunked
        )

    @cached_property
    def room(self) -> int:
        """The longest answer that ``prompt`` can have."""
        return self.limits.max_seq_len - len(self.prompt)

    @cached_property
    def text_room(self) -> int:
        """The longest answer that ``PROMPT`` can have from the text models, at most ``room``."""
        return min(self.room, self.limits.max_seq_len - len(self.encode(PROMPT)))

    def takes(self, model: str, name: str) -> bool:
        """Whether a model has an input."""
        return name in self._client.served_model(model).inputs

    def request(self, output_len: int, prompt: Sequence[int] | None = None, /, **more: Any) -> dict[str, Any]:
        """The tensors of a plain request to the engine's model: whole, no prompt; ``more`` replaces and adds."""
        ids = self.prompt if prompt is None else prompt
        return {"input_ids": np.array([ids], np.int32), "input_lengths": len(ids), "request_output_len": output_len,
                "exclude_input_in_output": True, **more}  # fmt: skip

    def stop_request(self, model: str = ENGINE) -> dict[str, Any]:
        """The tensors of a request that stops the one of its id, with what Triton demands of any."""
        return self.request(1, stop=True) if model != TEXT_MODEL else {"text_input": "-", "max_tokens": 1, "stop": True}

    def stream(self, deadline_s: float = _DEADLINE_S) -> Call:
        """A gRPC stream without a request."""
        return Call(self._infer, self._serialize, self._metadata, deadline_s)

    def open(self, tensors: Mapping[str, Any], *, model: str = ENGINE, request_id: str | None = None) -> Call:
        """Send a request on a stream of its own; a scalar becomes [1, 1], a list [1, n], an array stays as it is."""
        call = self.stream()
        call.send(tensors, model=model, request_id=request_id)
        return call

    def _serialize(self, tensors: Mapping[str, Any], model: str, request_id: str) -> Any:
        inputs = self._client.served_model(model).inputs
        message = pb.ModelInferRequest(model_name=model, id=request_id)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, value in tensors.items():
            if name not in inputs:
                raise NotApplicable(f"model {model} has no input {name}")
            shape, flat = _shaped(value)
            message.inputs.add(name=name, datatype=inputs[name], shape=shape)
            message.raw_input_contents.append(pack(inputs[name], flat))
        return message

    def ask(self, tensors: Mapping[str, Any], *, model: str = ENGINE, request_id: str | None = None) -> Answer:
        """Send a request and wait for all of its answer."""
        return self.open(tensors, model=model, request_id=request_id).rest()

    def generate(self, asked: Mapping[str, Any], *, model: str = ENGINE) -> Events:
        """Ask over HTTP; raises NotApplicable where the address is not known."""
        if self.http_url is None:
            raise NotApplicable("the server's HTTP address was not given (--http-url)")
        plain = {name: value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value
                 for name, value in asked.items()}  # fmt: skip
        return Events(self.http_url, self._headers, model, plain, deadline_s=_DEADLINE_S)

    def steps(self) -> float:
        """How many steps the engine counts; raises NotApplicable."""
        if self._metrics_url is None:
            raise NotApplicable("the server's metrics were not given (--metrics-url)")
        count = Metrics.read(self._metrics_url).sum("nv_trt_llm_general_metrics", general_type="iteration_counter")
        if count is None:
            raise NotApplicable("the server does not count the engine's steps")
        return count


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 300.0) -> None:
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
