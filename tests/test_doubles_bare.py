"""The bare process (bare_triton.py) against the real Triton with the small Minitron: the same calls, the same protocol.

Messages are compared without their values: tensors by name, type and shape, ids, final flags, errors by their kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from bare_process import Bare
from bare_triton import MODELS as SPOKEN
from conftest import DATA, SMALL_MODEL
from minitron import failures
from minitron.errors import NotReady
from minitron_client.client import Client, Request, dialect

pytestmark = pytest.mark.server

CONTRACT = json.loads((DATA / "triton_tensors.json").read_text())["models"]
MODELS = ("tensorrt_llm", "tensorrt_llm_bls", "ensemble")
WORDS = "In the beginning"
IDS = [17, 301, 23]


class Side:
    """One of the two servers, asked over a stub of its own."""

    def __init__(self, url: str, *, is_bare: bool) -> None:
        self.is_bare, self.client = is_bare, Client(url)
        self._channel = grpc.insecure_channel(url)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self.client.close()
        self._channel.close()

    def prompt(self, model: str, **behaviour: Any) -> dict[str, Any]:
        """A prompt that makes the bare process behave so, and any other for the real one."""
        if model == "tensorrt_llm":
            return {"input_ids": IDS}
        return {"prompt": json.dumps(behaviour) if self.is_bare and behaviour else WORDS}

    def message(self, model: str, request: Request, *, stream: bool) -> Any:
        return dialect.message(self.client.served_model(model), request, "an id", stream=stream)

    def said(self, message: Any) -> list[Any]:
        """What is said to a message, without values."""
        return [without_values(one) for one in self.stub.ModelStreamInfer(iter([message]))]


def without_values(said: Any) -> tuple[str, str, dict[str, tuple[str, list[int]]], str | None, bool]:
    infer = said.infer_response
    assert len(infer.outputs) == len(infer.raw_output_contents)
    outputs = {one.name: (one.datatype, list(one.shape)) for one in infer.outputs}
    error = type(failures.of_text(said.error_message, "")).__name__ if said.error_message else None
    final = infer.parameters["triton_final_response"].bool_param
    return infer.id, "" if error else infer.model_name, outputs, error, final


@pytest.fixture(scope="module")
def sides(bare: Bare, server: dict[str, Any]) -> Iterator[tuple[Side, Side]]:
    both = Side(bare.url, is_bare=True), Side(server["urls"]["grpc"], is_bare=False)
    yield both
    for side in both:
        side.close()


def fourth_token(side: Side, model: str) -> int:
    """The id that the server generates in fourth place; the bare process counts."""
    if side.is_bare:
        return 3
    ids = IDS if model == "tensorrt_llm" else Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json")).encode(WORDS).ids
    return side.client.generate(Request(input_ids=ids, max_tokens=4), model="tensorrt_llm").token_ids[3]


def asked(side: Side, model: str, case: str) -> Request:
    more: dict[str, Any] = {
        "length": {"max_tokens": 5},
        "an end": {"max_tokens": 8, "end_id": fourth_token(side, model)},
        "log probs": {"max_tokens": 5, "return_log_probs": True},
        "an end with log probs": {"max_tokens": 8, "end_id": fourth_token(side, model), "return_log_probs": True},
        "refused": {"max_tokens": 10**6},
    }[case]
    return Request(**side.prompt(model, tokens=99), **more)


CASES = ("length", "an end", "log probs", "an end with log probs", "refused")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_request_gets_the_same_messages(sides: tuple[Side, Side], model: str, case: str, stream: bool) -> None:
    found, wanted = (side.said(side.message(model, asked(side, model, case), stream=stream)) for side in sides)
    assert found == wanted


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_that_is_stopped_ends_alike(sides: tuple[Side, Side], model: str) -> None:
    """Tokens one by one, then the end; how many there are until then is a matter of speed.

    The stop goes to the engine, or to the text model, which has ids of its own towards the engine. Upstream's takes
    none, and the bare process stands for that one too.
    """
    said = []
    for side in sides:
        message = side.message(model, Request(**side.prompt(model, tokens=1500), max_tokens=1500), stream=True)
        messages = side.stub.ModelStreamInfer(iter([message]))
        found = [without_values(next(messages))]
        taker = model if model == "tensorrt_llm_bls" and not side.is_bare else "tensorrt_llm"
        answer = side.said(dialect.stop_message(side.client.served_model(taker), "an id"))
        assert taker != "tensorrt_llm" or answer == [("an id", "tensorrt_llm", {}, None, True)]
        for one in messages:
            found += [] if without_values(one) == found[-1] else [without_values(one)]
        said.append(found)
    assert said[0] == said[1]


def test_what_the_client_asks_about_a_model_is_answered_alike(sides: tuple[Side, Side]) -> None:
    bare, real = sides
    for model in MODELS:
        found, wanted = (side.client.served_model(model) for side in sides)
        assert (found.name, found.dialect, found.decoupled, found.batched, found.cumulative) == (
            wanted.name, wanted.dialect, wanted.decoupled, wanted.batched, wanted.cumulative)  # fmt: skip
        both = found.inputs.keys() & wanted.inputs.keys()
        assert {name: found.inputs[name] for name in both} == {name: wanted.inputs[name] for name in both}
        # The toolkit's own: the first in the text model, the second is read by the backend and not declared upstream.
        assert wanted.inputs.keys() - both <= {"stop", "no_repeat_ngram_size"}
    for question in ("is_live", "is_ready"):
        assert getattr(bare.client, question)() is getattr(real.client, question)() is True
    assert bare.client.is_model_ready("nope") is real.client.is_model_ready("nope") is False
    assert bare.client.metadata().keys() <= real.client.metadata().keys()
    assert bare.client.metadata()["version"] == real.client.metadata()["version"]
    for one in ("model_metadata", "config"):
        assert getattr(bare.client, one)("ensemble").keys() <= getattr(real.client, one)("ensemble").keys()
    assert bare.client.statistics("ensemble")[0].keys() <= real.client.statistics("ensemble")[0].keys()


def test_an_unknown_model_is_refused_alike(sides: tuple[Side, Side]) -> None:
    for side in sides:
        with pytest.raises(NotReady, match="unknown model"):
            side.client.served_model("nope")
    message = pb.ModelInferRequest(model_name="nope", id="an id")
    kinds = [[said[3] for said in side.said(message)] for side in sides]
    assert kinds[0] == kinds[1] == ["NotReady"]


def test_tensors_are_those_of_the_contract(sides: tuple[Side, Side]) -> None:
    """Also of llmapi, which cannot run here: names and types of every output that the bare process sends."""
    bare = sides[0]
    for model, name in SPOKEN.items():
        kinds = {one["name"]: one["dtype"].replace("STRING", "BYTES") for one in CONTRACT[name]["outputs"]}
        request = Request(**bare.prompt(model, tokens=3), max_tokens=3, return_log_probs=model != "llmapi")
        for _, _, outputs, error, _ in bare.said(bare.message(model, request, stream=True)):
            assert error is None
            assert {key: kind for key, (kind, _) in outputs.items()} == {key: kinds[key] for key in outputs}
