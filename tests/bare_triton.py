"""A bare gRPC process that speaks Triton's protocol without Triton: it answers as each prompt tells it to.

For what the real server cannot be made to do on demand: refuse, fail, die or fall silent at a certain token. A prompt
that is a JSON object sets the behaviour (see ``Behaviour``); any other prompt gets the default one. Tokens are 0, 1, 2
and so on, so that an ``end_id`` says at which place the answer ends. Tensor names, their types and the error texts are
the contract's (tests/data/triton_tensors.json); tensors are read with tritonclient's own functions;
test_doubles_bare.py holds the messages against the real server's. Every request, cancel, stop and end is a JSON line in
``--events``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

CONTRACT = Path(__file__).parent / "data" / "triton_tensors.json"
MODELS = {"tensorrt_llm_bls": "tensorrt_llm_bls", "ensemble": "ensemble", "tensorrt_llm": "tensorrt_llm",
          "llmapi": "llmapi_tensorrt_llm"}  # fmt: skip
MAX_SEQ_LEN = 1 << 17
_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


@dataclass
class Behaviour:
    """What a prompt asks for: ``tokens`` sent ``interval_ms`` apart, ``per_response`` at once, and what goes wrong."""

    tokens: int = 8
    interval_ms: float = 1.0
    per_response: int = 1
    counts: bool = True
    error: str = ""
    error_after: int = 0  # responses before the error
    reject_times: int = 0  # how often this prompt is refused before it is answered
    die_after: int = -1  # responses before the process ends
    silent: bool = False
    first_id: int = 300  # with --tokenizer: the first token's id, the others follow
    log_probs: int | None = None  # how many log probs each response has, where that is not one a token
    context_rows: int | None = None  # of how many tokens the logits of the prompt are, where that is not all of them
    unfinished: bool = False  # ends the stream in good order, but without the last response

    @classmethod
    def of(cls, prompt: str) -> Behaviour:
        try:
            return cls(**json.loads(prompt)) if prompt.startswith("{") else cls()
        except json.JSONDecodeError:  # a text that begins so
            return cls()


class BareTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(
        self, version: str, models: list[str], events: Path, tokenizer: str | None = None, context_logits: str = "none"
    ) -> None:
        self._version, self._models, self._events = version, models, events.open("a", buffering=1)
        self._tokenizer_dir, self._decode, self._context_logits = tokenizer, _decoder(tokenizer), context_logits
        self._contract = json.loads(CONTRACT.read_text())["models"]
        self._stops: dict[str, asyncio.Event] = {}
        self._refused: dict[str, int] = {}

    def _note(self, event: str, **facts: Any) -> None:
        self._events.write(json.dumps({"event": event, "time_ns": time.monotonic_ns(), **facts}) + "\n")

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelReadyResponse(ready=request.name in self._models)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerMetadataResponse(name="bare", version=self._version)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelMetadataResponse(name=request.name, versions=["1"])

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(name=request.name, inference_count=3)])

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name not in self._models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        contract = self._contract[MODELS[request.name]]
        config = pb.model__config__pb2.ModelConfig(
            name=request.name, max_batch_size=0 if request.name == "llmapi" else 8
        )
        for tensor in contract["inputs"]:
            kind = dict(pb.model__config__pb2.DataType.items()).get("TYPE_" + tensor["dtype"], 0)
            config.input.add(name=tensor["name"], data_type=kind, dims=tensor["dims"])
        config.model_transaction_policy.decoupled = True
        if self._tokenizer_dir and request.name == "tensorrt_llm_bls":
            parameters = _parameters(self._tokenizer_dir) | {"context_logits": self._context_logits}
            for key, value in parameters.items():
                config.parameters[key].string_value = value
        if request.name == "ensemble":
            config.platform = "ensemble"
            config.model_transaction_policy.decoupled = False  # as the server leaves it
            step = config.ensemble_scheduling.step.add(model_name="tensorrt_llm", model_version=-1)
            step.input_map["input_ids"] = "_INPUT_ID"
        return pb.ModelConfigResponse(config=config)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
        async for request in requests:
            if request.model_name not in self._models:
                yield _error(request, f"Request for unknown model: '{request.model_name}' is not found")
                continue
            inputs = _inputs(request)
            if inputs.get("stop"):
                self._note("stop", id=request.id, model=request.model_name)
                if request.id in self._stops:
                    self._stops[request.id].set()
                yield _response(request, {}, final=True)
                continue
            self._note("request", id=request.id, model=request.model_name, inputs=inputs,
                       shapes={one.name: list(one.shape) for one in request.inputs},
                       metadata=dict(context.invocation_metadata()))  # fmt: skip
            self._stops[request.id] = asyncio.Event()
            ended = False
            try:
                async for response in self._answer(request, inputs):
                    yield response
                ended = True
            finally:  # a cancel arrives as CancelledError while waiting, as GeneratorExit while sending
                self._note("end" if ended else "cancel", id=request.id)

    async def _answer(self, request: Any, inputs: dict[str, Any]) -> Any:
        prompt = self._decode(inputs["input_ids"]) if "input_ids" in inputs else inputs.get("text_input", "")
        behaviour = Behaviour.of(prompt)
        name = {"tensorrt_llm": "request_output_len", "llmapi": "sampling_param_max_tokens"}
        limit = inputs[name.get(request.model_name, "max_tokens")]
        if self._refused.get(prompt, 0) < behaviour.reject_times:
            self._refused[prompt] = self._refused.get(prompt, 0) + 1
            yield _error(request, "Maximum queue size of 4 has been reached, please try again later")
            return
        if limit >= MAX_SEQ_LEN:
            yield _error(request, f"Requested output length ({limit}): max_seq_len is {MAX_SEQ_LEN}")
            return
        end = -1 if self._tokenizer_dir else inputs.get("end_id", -1)  # ids begin where no end id is
        wanted = (
            limit if inputs.get("min_tokens") == limit else min(limit, behaviour.tokens, end if end >= 0 else limit)
        )
        streaming = inputs.get("stream") or inputs.get("streaming")
        step = behaviour.per_response if streaming else max(wanted, 1)
        sent, stop = 0, self._stops[request.id]
        # The engine's last tokens are final where no more could come; the text model closes with a message of its own.
        at_limit, closes = wanted == limit or not streaming, request.model_name not in ("ensemble", "tensorrt_llm")
        if behaviour.silent:
            await stop.wait()
        for number, first in enumerate(range(0, wanted, step)):
            if number == behaviour.die_after:
                os._exit(9)
            if behaviour.error and number == behaviour.error_after:
                yield _error(request, behaviour.error)
                return
            await asyncio.sleep(behaviour.interval_ms / 1000)
            if stop.is_set():
                break
            tokens = list(range(first, min(first + step, wanted)))
            if self._tokenizer_dir:
                tokens = [behaviour.first_id + token for token in tokens]
            sent += len(tokens)
            last = sent == wanted and at_limit and not closes and not behaviour.unfinished
            yield _response(request, self._outputs(request, behaviour, inputs, tokens, sent), final=last)
            if last:
                return
        if behaviour.unfinished:
            return
        is_end = sent == 0 or not (at_limit or stop.is_set())  # the engine's message of an end has no token
        if not closes or (is_end and request.model_name == "tensorrt_llm_bls"):
            yield _response(request, self._outputs(request, behaviour, inputs, [], sent), final=not closes)
        if closes:
            yield _response(request, {}, final=True)

    def _outputs(
        self, request: Any, behaviour: Behaviour, inputs: dict[str, Any], tokens: list[int], sent: int
    ) -> dict[str, Any]:
        outputs: dict[str, Any]
        if request.model_name == "llmapi":  # its text repeats what came before
            done = sent == min(inputs["sampling_param_max_tokens"], behaviour.tokens)
            reason = {"finish_reason": np.array(["stop" if done else ""], np.object_)}
            return {"text_output": np.array(["".join(f" w{i}" for i in range(sent))], np.object_), **reason}
        if request.model_name == "tensorrt_llm":
            outputs = {"output_ids": np.array([[tokens]], np.int32).reshape(1, 1, -1),
                       "sequence_length": np.array([[len(tokens)]], np.int32)}  # fmt: skip
            prompt = inputs["input_lengths"]
        else:
            outputs = {"text_output": np.array(["".join(f" w{token}" for token in tokens)], np.object_)}
            prompt = len(inputs["text_input"].split())
        for asked, name, count in (("return_num_input_tokens", "num_input_tokens", prompt),
                                   ("return_num_output_tokens", "num_output_tokens", len(tokens))):  # fmt: skip
            if behaviour.counts and inputs.get(asked):
                outputs[name] = np.array([[count]], np.int32)
        if inputs.get("return_log_probs"):
            count = len(tokens) if behaviour.log_probs is None else behaviour.log_probs
            outputs["output_log_probs"] = np.array([[[-0.5] * count]], np.float32).reshape(1, 1, -1)
            outputs["cum_log_probs"] = np.array([[-0.5 * sent]], np.float32)
        if inputs.get("return_context_logits"):
            rows = inputs["input_lengths"] if behaviour.context_rows is None else behaviour.context_rows
            outputs["context_logits"] = np.zeros((1, rows, 1024), np.float32)
        return outputs


def _decoder(tokenizer: str | None) -> Any:
    """Ids to the text that sets the behaviour; without a tokenizer they set none."""
    if tokenizer is None:
        return lambda ids: ""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    return lambda ids: loaded.decode(ids if isinstance(ids, list) else [ids])


def _parameters(tokenizer: str) -> dict[str, str]:
    """Those of a rendered text model, with limits that let a prompt of behaviour through."""
    return {"tensorrt_llm_model_name": "tensorrt_llm", "tokenizer_dir": tokenizer, "add_special_tokens": "false",
            "skip_special_tokens": "true", "max_input_len": "2000", "max_seq_len": "20000",
            "vocab_size": "1024"}  # fmt: skip


def _inputs(request: Any) -> dict[str, Any]:
    """Scalars as they are, everything longer as a list."""
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            flat = [one.decode() for one in deserialize_bytes_tensor(raw)]
        else:
            flat = np.frombuffer(raw, _NUMPY[tensor.datatype]).tolist()
        assert len(flat) == int(np.prod(tensor.shape)), tensor.name
        values[tensor.name] = flat[0] if len(flat) == 1 else flat
    return values


def _response(request: Any, outputs: dict[str, Any], *, final: bool) -> Any:
    infer = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    infer.parameters["triton_final_response"].bool_param = final
    for name, value in outputs.items():
        if value.dtype == np.object_:
            kind, raw = "BYTES", b"".join(len(s.encode()).to_bytes(4, "little") + s.encode() for s in value.flat)
        else:
            kind, raw = {"i": "INT32", "f": "FP32"}[value.dtype.kind], value.tobytes()
        infer.outputs.add(name=name, datatype=kind, shape=value.shape)
        infer.raw_output_contents.append(raw)
    return pb.ModelStreamInferResponse(infer_response=infer)


def _error(request: Any, text: str) -> Any:
    infer = pb.ModelInferResponse(id=request.id)
    infer.parameters["triton_final_response"].bool_param = True
    return pb.ModelStreamInferResponse(error_message=text, infer_response=infer)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until killed; the port goes to stdout."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        BareTriton(
            arguments.version,
            arguments.models.split(","),
            arguments.events,
            arguments.tokenizer,
            arguments.context_logits,
        ),
        server,
    )
    address = f"127.0.0.1:{arguments.port}"
    if arguments.tls:
        key, cert, ca = (Path(arguments.tls, name).read_bytes() for name in ("server.key", "server.crt", "ca.crt"))
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, arguments.mutual)
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--version", default="2.51.0")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--tokenizer", help="folder: prompts of ids are read with it, as those of a model that has it")
    parser.add_argument("--context-logits", default="none", help="what the text model says of the engine's")
    parser.add_argument("--tls")
    parser.add_argument("--mutual", action="store_true")
    asyncio.run(serve(parser.parse_args()))
