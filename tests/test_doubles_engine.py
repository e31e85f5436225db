"""The echo engine (doubles/echo_engine.py) against the CPU engine, both in the real Triton: the same requests, answered
with the same messages in the same order, tensor by tensor and flag by flag. Only the tokens themselves differ.

The CPU engine is the small Minitron's, with one thing added: a seed of 13 breaks it after three tokens, one of 14
before the first, as they do the echo engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serving
from minitron import failures
from minitron.acceptance import PASS
from minitron.artifacts import manifest
from minitron_client.client.endpoint import Endpoint
from minitron_client.conformance import suite
from minitron_client.conformance.subject import OPENVINO, Limits, Message, Subject, wait_until

pytestmark = pytest.mark.server

FAULTS = """

_advance = Engine._advance


def _advance_or_break(self, batch):
    for one in batch.values():
        after = {13: 3, 14: 0}.get(one.request.seed)
        if after is not None and not one.answered and len(one.token_ids) == after:
            raise RuntimeError("bad place")
    return _advance(self, batch)


Engine._advance = _advance_or_break
"""
PROMPT = [17, 301, 23, 250, 41, 199, 67, 103]
LENGTH = 12


@pytest.fixture(scope="module")
def echo(echo_server: dict[str, Any]) -> Iterator[Subject]:
    repository = Path(echo_server["repository"])
    size = manifest.read(repository / "engine", "engine").details["vocab_size"]
    limits = Limits(max_batch_size=4, max_input_len=512, max_seq_len=2048, max_num_tokens=8192, vocab_size=size)
    urls = echo_server["urls"]
    with Subject(Endpoint(urls["grpc"]), engine=OPENVINO, limits=limits, tokenizer=repository / "tokenizer",
                 metrics_url=urls["metrics"], http_url=urls["http"]) as subject:  # fmt: skip
        yield subject


@pytest.fixture(scope="module")
def cpu(small_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    source, folder = small_repository("bfloat16"), tmp_path_factory.mktemp("faulty") / "repository"
    shutil.copytree(source, folder, symlinks=True)
    with (folder / "tensorrt_llm" / "1" / "cpu_engine.py").open("a") as code:
        code.write(FAULTS)
    record = manifest.read(source, "repository")
    (folder / manifest.NAME).unlink()
    manifest.write(folder, "repository", record.input, arguments={}, details=record.details | {"root": str(folder)})
    with serving.server(folder) as document, Subject.of_repository(
        Endpoint(document["urls"]["grpc"]), folder, document["urls"]["metrics"], document["urls"]["http"]
    ) as subject:  # fmt: skip
        yield subject


@pytest.mark.parametrize("case", [
    "streaming", "whole_answer", "counts", "log_probs", "batch", "several_sequences", "length", "end_id", "end_first",
    "stop_ids", "stop_words", "text", "min_tokens", "refusal", "stop", "stop_without_id", "prompt_limit",
    "sequence_limit", "output_length_zero", "empty_prompt",
])  # fmt: skip
def test_the_echo_engine_behaves_as_documented(echo: Subject, case: str) -> None:
    """``conformance``, which the CPU engine passes whole."""
    (line,) = suite.run(echo, [f"behaviour.{case}"])
    assert line.status == PASS, line.evidence


Said = tuple[dict[str, tuple[str, tuple[int, ...]]], str | None, bool]


def said(message: Message) -> Said:
    """A message without its values: outputs with type and shape, the kind of its error, its final flag."""
    outputs = {name: (value.dtype.name, value.shape) for name, value in message.outputs.items()}
    error = None if message.error is None else type(failures.of_text(message.error, "")).__name__
    return outputs, error, message.final


def place_of(message: Message) -> tuple[int, int]:
    """Which sequence of its request a message is about."""
    row, number = (int(message.outputs[name].item()) if name in message.outputs else 0
                   for name in ("batch_index", "sequence_index"))  # fmt: skip
    return row, number


def transcript(subject: Subject, tensors: dict[str, Any]) -> dict[Any, list[Said]]:
    """What is said to a request, sequence by sequence: they may be answered one after the other or side by side.

    The last message of all has the final flag.
    """
    messages = list(subject.open(tensors).to_the_end())
    assert not any("batch" in (message.error or "") for message in messages), messages[0].error
    assert [message.final for message in messages] == [False] * (len(messages) - 1) + [True]
    found: dict[Any, list[Said]] = {}
    for message in messages:
        outputs, error, _ = said(message)
        found.setdefault(place_of(message), []).append((outputs, error, False))
    return dict(sorted(found.items()))


def tokens(subject: Subject) -> list[int]:
    """What it goes on with behind the prompt."""
    return subject.ask(subject.request(LENGTH, PROMPT)).token_ids


def new_at(subject: Subject, place: int) -> int:
    """Its token at a place, which is none of those before."""
    made = tokens(subject)
    assert made[place] not in made[:place]
    return made[place]


def batch(subject: Subject, **more: Any) -> dict[str, Any]:
    """Two rows of different lengths."""
    ids = np.array([PROMPT, [*PROMPT[:5], 0, 0, 0]], np.int32)
    both = {name: np.full((2, 1), value) for name, value in more.items()}
    return {"input_ids": ids, "input_lengths": np.array([[8], [5]], np.int32),
            "request_output_len": np.array([[6], [4]], np.int32), **both}  # fmt: skip


ALL = {"return_log_probs": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
#: Requests by what is special about them, each asked streamed and whole.
REQUESTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "plain": lambda subject: subject.request(LENGTH, PROMPT),
    "one token": lambda subject: subject.request(1, PROMPT),
    "with the prompt": lambda subject: subject.request(LENGTH, PROMPT, exclude_input_in_output=False),
    "log probs and counts": lambda subject: subject.request(LENGTH, PROMPT, **ALL),
    "them with the prompt": lambda subject: subject.request(LENGTH, PROMPT, exclude_input_in_output=False, **ALL),
    "none of them, in words": lambda subject: subject.request(LENGTH, PROMPT, **dict.fromkeys(ALL, False)),
    "a batch": batch,
    "a batch with all": lambda subject: batch(subject, **ALL),
    "a batch of which one row is wrong": lambda subject: batch(subject) | {
        "request_output_len": np.array([[6], [0]], np.int32)},
    "three sequences": lambda subject: subject.request(LENGTH, PROMPT, num_return_sequences=3),
    "an end": lambda subject: subject.request(LENGTH, PROMPT, end_id=new_at(subject, 3)),
    "an end with all": lambda subject: subject.request(LENGTH, PROMPT, end_id=new_at(subject, 3), **ALL),
    "an end at once": lambda subject: subject.request(LENGTH, PROMPT, end_id=tokens(subject)[0]),
    "an end at once with all": lambda subject: subject.request(LENGTH, PROMPT, end_id=tokens(subject)[0], **ALL),
    "an end where it would have ended": lambda subject: subject.request(4, PROMPT, end_id=new_at(subject, 3)),
    "three sequences with an end": lambda subject: subject.request(
        LENGTH, PROMPT, num_return_sequences=3, end_id=new_at(subject, 3)),
    "a stop list": lambda subject: subject.request(
        LENGTH, PROMPT, stop_words_list=np.array([[[*tokens(subject)[2:4], 7], [2, 3, -1]]], np.int32)),
    "an empty stop list": lambda subject: subject.request(
        LENGTH, PROMPT, stop_words_list=np.zeros((1, 2, 0), np.int32)),
    "an empty prompt": lambda subject: subject.request(LENGTH, []),
    "no output": lambda subject: subject.request(0, PROMPT),
    "a long prompt": lambda subject: subject.request(1, PROMPT * (subject.limits.max_input_len // 8 + 1)),
    "a long output": lambda subject: subject.request(subject.limits.max_seq_len, PROMPT),
    "an error at once": lambda subject: subject.request(LENGTH, PROMPT, seed=14),
    "an error behind three tokens": lambda subject: subject.request(LENGTH, PROMPT, seed=13),
    "a stop of nobody": lambda subject: subject.request(1, PROMPT, stop=True),
}  # fmt: skip


def streamed(request: dict[str, Any]) -> dict[str, Any]:
    """The same, streamed."""
    return request | {"streaming": np.full((len(request["input_ids"]), 1), True)}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_request_gets_the_same_messages(echo: Subject, cpu: Subject, name: str, streams: bool) -> None:
    found, wanted = (
        transcript(subject, streamed(REQUESTS[name](subject)) if streams else REQUESTS[name](subject))
        for subject in (echo, cpu)
    )
    assert found == wanted


@pytest.mark.parametrize("streams", [True, False])
def test_an_error_behind_tokens_ends_a_batch_whole_for_both(echo: Subject, cpu: Subject, streams: bool) -> None:
    """Which tokens came before it is a matter of which sequence went first; it is the last message, and final."""
    for subject in (echo, cpu):
        request = batch(subject, seed=np.uint64(13))
        *_, last = subject.open(streamed(request) if streams else request).to_the_end()
        assert (last.error is not None, last.final, last.outputs) == (True, True, {})


@pytest.mark.parametrize("subject_name", ["echo", "cpu"])
def test_a_stopped_stream_ends_with_an_empty_answer(echo: Subject, cpu: Subject, subject_name: str) -> None:
    """On one stream: tokens one by one, the empty answer to the stop, and one without a token that is final."""
    subject = {"echo": echo, "cpu": cpu}[subject_name]
    call = subject.stream()
    name = call.send(subject.request(1500, PROMPT, streaming=True, **slow(subject_name, 1.0)))
    assert said(next(call)) == token()
    call.send(subject.request(1, stop=True), request_id=name)
    messages = [said(message) for message in call.to_the_end()]
    assert messages.count(({}, None, True)) == 1  # the answer to the stop, before or behind the stream's last
    *tokens_before, last = [one for one in messages if one != ({}, None, True)]
    assert last == token(0, final=True)
    assert tokens_before == [token()] * len(tokens_before)
    assert len(tokens_before) < 1400


def token(count: int = 1, *, final: bool = False) -> Said:
    """A message with so many tokens and nothing else."""
    return {"output_ids": ("int32", (1, 1, count)), "sequence_length": ("int32", (1, 1))}, None, final


@pytest.mark.parametrize("subject_name", ["echo", "cpu"])
def test_a_client_that_leaves_leaves_an_engine_that_goes_on(
    echo: Subject, cpu: Subject, echo_server: dict[str, Any], subject_name: str
) -> None:
    """At a few milliseconds a step: Triton 2.51 was seen to die of a stream that is cancelled while it is full."""
    subject = {"echo": echo, "cpu": cpu}[subject_name]
    call = subject.open(subject.request(1500, PROMPT, streaming=True, **slow(subject_name, 5.0)))
    assert said(next(call)) == token()
    call.cancel()
    if subject_name == "echo":
        noted = echo_server["steps"]
        wait_until(lambda: json.loads(noted.read_text().splitlines()[-1])["stopped"], "a note of the end")
        assert json.loads(noted.read_text().splitlines()[-1])["steps"] < 1500
    assert subject.ask(subject.request(LENGTH, PROMPT)).token_ids == tokens(subject)


def slow(subject_name: str, ms: float) -> dict[str, float]:
    """The temperature is milliseconds a step for the echo engine; the other one takes its time."""
    return {"temperature": ms} if subject_name == "echo" else {}
