"""Cases about requests that end early, are wrong, or are too many.

After every one of them the next plain request must be answered as ever. Where the contract says that the C++ backend
does otherwise than the CPU engine, a case carries both expectations, each with its source.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minitron_trtllm.conformance.answers import agree, first_new, good
from minitron_trtllm.conformance.generate import values
from minitron_trtllm.conformance.subject import (
    ENGINE,
    ENSEMBLE,
    FRONT,
    OPENVINO,
    PROMPT,
    Answer,
    Call,
    Disagreement,
    Message,
    NotApplicable,
    RefusedByServer,
    Subject,
    wait_until,
)

_FULL = ("Maximum queue size of", "Exceeds maximum queue size")
_BIAS = 1e4
_UNSUPPORTED, _UNSUPPORTED_SOURCE = "not supported by the CPU engine", "docs/cpu-engine.md: OpenVINO GenAI cannot do it"
#: So many looks, 50 ms apart, without a change: longer than stats_check_period_ms, by which the count is updated.
_LOOKS = 6
#: Where an answer may be over before the client could do something about it, it is tried again so often.
_TRIES = 3
_GROUP, _SHORT_S = 16, 0.5


@dataclass(frozen=True)
class Refuses:
    """Answers with an error that has ``text`` in it."""

    text: str
    source: str


@dataclass(frozen=True)
class Answers:
    """Answers, and ``holds`` raises Disagreement where the answer is not the one expected."""

    holds: Callable[[Answer], None]
    source: str


@dataclass(frozen=True)
class Either:
    """Refuses, or answers with whatever: no source says which, but ``tokens`` of it and no more harm."""

    tokens: int
    source: str


Expected = Refuses | Answers | Either


def cancel(subject: Subject) -> str:
    """Seen in the engine's own count of steps: it stands still long before the answer would have been complete."""

    def over_grpc(model: str) -> None:
        call = subject.open(_long(subject, model), model=model)
        for _ in range(3):
            first(call)
        call.cancel()

    def over_http(model: str) -> None:
        events = subject.generate(_long(subject, model), model=model)
        for _ in range(3):
            next(events)
        events.close()

    models = [model for model in (ENGINE, FRONT) if model in subject.models]  # an ensemble's has to be told to stop
    steps = [_left(subject, f"{model}, gRPC", partial(over_grpc, model)) for model in models]
    if subject.http_url:
        steps += [_left(subject, f"{model}, HTTP", partial(over_http, model)) for model in models]
    return f"left after 3 of {subject.room} tokens, at rest after at most {max(steps):.0f} steps, {len(steps)} ways"


def deadline(subject: Subject) -> str:
    """A client whose own time is over goes away as one that cancels."""

    def give_up() -> None:
        call = subject.stream(_SHORT_S)
        call.send(_long(subject, ENGINE))
        if call.rest().error is None:
            raise NotApplicable(f"{subject.room} tokens came within {_SHORT_S:g} s")

    steps = _left(subject, "deadline", give_up)
    return f"given up after {_SHORT_S:g} s, at rest after {steps:.0f} of {subject.room} steps"


def _long(subject: Subject, model: str) -> dict[str, Any]:
    """The longest answer that there can be, streamed and counted."""
    if model == ENGINE:
        return subject.request(subject.room, streaming=True, return_num_output_tokens=True)
    return {"text_input": PROMPT, "max_tokens": subject.text_room, "end_id": -1, "stream": True,
            "return_num_output_tokens": True}  # fmt: skip


def _left(subject: Subject, how: str, leave: Callable[[], None]) -> float:
    """Steps that the engine made for a client that left, fewer than a whole answer has.

    A client that was itself kept from leaving until the answer was complete shows nothing, so there are several tries.
    The plain request behind it makes the count fresh: the C++ backend's stands still while nothing is generated.
    """
    for _ in range(_TRIES):
        before = _steps_at_rest(subject)
        leave()
        fine(subject)
        steps = _steps_at_rest(subject) - before
        if steps < subject.text_room:
            return steps
    raise Disagreement(
        f"{how}: {steps:.0f} steps were made for a client that had left at the beginning of {subject.room} tokens"
    )


def _steps_at_rest(subject: Subject) -> float:
    """The engine's count of steps once it does not move any more."""
    seen: list[float] = []

    def at_rest() -> bool:
        seen.append(subject.steps())
        return len(seen) > _LOOKS and len(set(seen[-_LOOKS:])) == 1

    wait_until(at_rest, "an engine at rest")
    return seen[-1]


def stop(subject: Subject) -> str:
    """A second request with ``stop`` and the same id; the first ends in good order, its id is free again.

    Both are on one stream, so that the server's own order tells what came before what.
    """
    unknown = subject.ask(_stops(subject, ENGINE), request_id=uuid.uuid4().hex)
    agree("the answer to stop of an unknown id", unknown.error, None)
    told = [_stopped(subject, model) for model in (ENGINE, ENSEMBLE, FRONT) if _can_stop(subject, model)]
    if subject.http_url:
        told += [_stopped_over_http(subject, model) for model in (ENGINE, ENSEMBLE) if model in subject.models]
    fine(subject)
    return f"of {subject.room} tokens, so many before the stop was answered, and in all: {', '.join(told)}"


def _can_stop(subject: Subject, model: str) -> bool:
    """Upstream's text model takes no ``stop``: it gives its requests ids of its own."""
    return model in subject.models and (model != FRONT or subject.takes(FRONT, "stop"))


def _stops(subject: Subject, model: str) -> dict[str, Any]:
    """A request that stops the one of its id, with what Triton demands of any; to an ensemble's engine."""
    return subject.request(1, stop=True) if model != FRONT else {"text_input": "-", "max_tokens": 1, "stop": True}


def _stopped(subject: Subject, model: str) -> str:
    for _ in range(_TRIES):
        call = subject.stream()
        name = call.send(_long(subject, model), model=model)
        tokens = _count(first(call))
        call.send(_stops(subject, model), model=FRONT if model == FRONT else ENGINE, request_id=name)
        before = 0
        for message in call.to_the_end():
            if message.error:
                raise Disagreement(f"{model}: the stopped request, or the stop, was answered with {message.error!r}")
            before = before or (tokens if not message.outputs else 0)  # the answer to a stop is empty
            tokens += _count(message)
        if tokens < subject.text_room:
            return f"{model} {before}, {tokens}"
        if before < tokens // 2:
            raise Disagreement(f"{model}: stopped after {before} tokens, the request ran to its end all the same")
    raise Disagreement(f"{model}: a stop was answered only after {before} of {tokens} tokens, {_TRIES} times")


def _stopped_over_http(subject: Subject, model: str) -> str:
    """Two connections have no order: only an answer that is cut short says something."""
    for _ in range(_TRIES):
        name = uuid.uuid4().hex
        events = subject.generate({"id": name, **_long(subject, model)}, model=model)
        tokens = sum(values(next(events), "num_output_tokens"))
        stopped = list(subject.generate({"id": name, **_stops(subject, ENGINE)}))
        agree(f"{model}, HTTP: errors of the stop", [one for one in stopped if "error" in one], [])
        tokens += sum(sum(values(one, "num_output_tokens")) for one in events)
        if tokens < subject.text_room:
            return f"{model} over HTTP {tokens}"
    raise Disagreement(f"{model}, HTTP: the request ran to its end although it was stopped, {_TRIES} times")


def _count(message: Message) -> int:
    return int(message.outputs["num_output_tokens"].sum()) if "num_output_tokens" in message.outputs else 0


def stop_without_id(subject: Subject) -> str:
    """Which request should end?"""
    return refused(subject, subject.request(1, stop=True), request_id="")


def duplicate_id(subject: Subject) -> str:
    """Two live requests of one id, on one stream: the first must go on when the second has been answered."""
    for _ in range(_TRIES):
        call = subject.stream()
        name = call.send(subject.request(subject.room, streaming=True))
        first(call)
        call.send(subject.request(4, return_num_input_tokens=True), request_id=name)
        second, alive = Answer(), True
        for message in call:
            if message.error or "num_input_tokens" in message.outputs:
                second.take(message)
                break
            alive = alive and not message.final
        call.send(_stops(subject, ENGINE), request_id=name)
        call.rest()
        if alive:
            break
    else:
        raise NotApplicable(f"the first of two requests was over before the second was answered, {_TRIES} times")
    return as_expected(
        subject,
        second,
        openvino=Refuses("must be unique", "docs/cpu-engine.md: a later 'stop' could not tell them apart"),
        tensorrt=Answers(
            lambda answer: agree("tokens", answer.token_ids, subject.greedy[:4]),
            "model_instance_state.cc: the entry of the id is overwritten, both run",
        ),
    )


def prompt_limit(subject: Subject) -> str:
    """One token more than the engine takes."""
    length = subject.limits.max_input_len + 1
    ids = (subject.prompt * (length // len(subject.prompt) + 1))[:length]
    return refused(subject, subject.request(1, ids), "exceed")


def sequence_limit(subject: Subject) -> str:
    """One token more than prompt and output may have together."""
    room = subject.room
    return as_expected(
        subject,
        subject.ask(subject.request(room + 1)),
        openvino=Refuses("exceed", "docs/cpu-engine.md: a shorter answer than the one asked for would go unnoticed"),
        tensorrt=Answers(
            lambda answer: agree("how many tokens", len(answer.token_ids), room),
            "llmRequest.cpp, validate: the output is shortened to what fits, with a warning in the log",
        ),
    )


def output_length_zero(subject: Subject) -> str:
    """Nothing is asked for."""
    return refused(subject, subject.request(0))


def empty_prompt(subject: Subject) -> str:
    """No token at all."""
    return refused(subject, subject.request(4, []))


def top_p_range(subject: Subject) -> str:
    """A share above 1."""
    return as_expected(
        subject,
        subject.ask(subject.request(4, runtime_top_p=1.5, seed=1)),
        openvino=Refuses("top_p is 1.5", "docs/cpu-engine.md: top_p must be at most 1"),
        tensorrt=Either(4, "topPSamplingLayer.cu clips it with a warning; the executor's own check may come first"),
    )


def malformed_words(subject: Subject) -> str:
    """Ends that go down."""
    lists = np.array([[[5, 6], [2, 1]]], np.int32)
    return refused(subject, subject.request(4, stop_words_list=lists))


def foreign_token(subject: Subject) -> str:
    """The first id past the vocabulary."""
    return as_expected(
        subject,
        subject.ask(subject.request(4, [*subject.prompt[:4], subject.limits.vocab_size])),
        openvino=Refuses("must be from 0 to", "docs/cpu-engine.md: OpenVINO would answer with garbage"),
        tensorrt=Either(4, "not documented for the C++ backend"),
    )


def beam_width(subject: Subject) -> str:
    """Two beams of an engine that was built for one."""
    return as_expected(
        subject,
        subject.ask(subject.request(4, beam_width=2)),
        openvino=Refuses(_UNSUPPORTED, _UNSUPPORTED_SOURCE),
        tensorrt=Refuses("beam", "executor: above max_beam_width, 1 unless trtllm_build.max_beam_width says otherwise"),
    )


def bad_words(subject: Subject) -> str:
    """The token that greedy search would take first is forbidden."""
    forbidden = subject.greedy[0]

    def left_out(answer: Answer) -> None:
        if forbidden in answer.token_ids or len(answer.token_ids) != 4:
            raise Disagreement(f"tokens {answer.token_ids}, and {forbidden} was forbidden")

    return as_expected(
        subject,
        subject.ask(subject.request(4, bad_words_list=np.array([[[forbidden], [1]]], np.int32))),
        openvino=Refuses(_UNSUPPORTED, _UNSUPPORTED_SOURCE),
        tensorrt=Answers(left_out, "utils.cc: bad_words_list is handed to the executor"),
    )


def embedding_bias(subject: Subject) -> str:
    """A bias that no logit can outweigh."""
    favourite = subject.greedy[first_new(subject.greedy)]
    bias = np.zeros((1, subject.limits.vocab_size), np.float32)
    bias[0, favourite] = _BIAS
    return as_expected(
        subject,
        subject.ask(subject.request(3, embedding_bias=bias)),
        openvino=Refuses(_UNSUPPORTED, _UNSUPPORTED_SOURCE),
        tensorrt=Answers(
            lambda answer: agree("tokens", answer.token_ids, [favourite] * 3),
            "utils.cc: embedding_bias is added to the logits",
        ),
    )


def queue_full(subject: Subject) -> str:
    """More long requests than run and wait; then all are stopped, and the next one is answered.

    All are on one stream, in groups. Behind each a ``stop`` of nobody is sent, which is answered when those before it
    have been taken in or refused.
    """
    limit = subject.queue_limit
    if not limit:
        raise NotApplicable("this engine's queue has no limit (serving.max_queue_size, serving.executor_queue_policy)")
    # Triton's own queue, in front of a TensorRT engine's, has the same limit.
    most = 2 * limit + 4 * subject.limits.max_batch_size + 64
    call = subject.stream()
    names: list[str] = []
    refusals: list[str] = []
    while not refusals and len(names) < most:
        names += [call.send(subject.request(subject.room)) for _ in range(_GROUP)]
        refusals += _refused_by_now(subject, call)
    for start in range(0, len(names), _GROUP):
        _stop_all(subject, call, names[start : start + _GROUP])
    call.rest()
    if not refusals:
        raise Disagreement(f"{len(names)} requests were taken with a queue of {limit}")
    if not any(text in refusals[0] for text in _FULL):
        raise Disagreement(f"the surplus was refused with {refusals[0]!r}")
    wait_until(lambda: subject.ask(subject.request(4)).token_ids == subject.greedy[:4], "an answer after the rush")
    return f"refused after {len(names)} requests with a queue of {limit}: {refusals[0]}"


def _stop_all(subject: Subject, call: Call, names: list[str]) -> None:
    refused = True
    while refused:  # the queue may be too full even for that
        for name in names:
            call.send(_stops(subject, ENGINE), request_id=name)
        refused = bool(_refused_by_now(subject, call))


def _refused_by_now(subject: Subject, call: Call) -> list[str]:
    """Stop nobody, and read on until that is answered: the errors until then."""
    name = call.send(_stops(subject, ENGINE))
    errors = []
    for message in call:
        if message.error:
            errors.append(message.error)
        if message.id == name:
            break
    return errors


def first(call: Call) -> Message:
    """The next message of a request that must be answered; raises RefusedByServer."""
    message = next(call)
    if message.error is not None:
        raise RefusedByServer(message.error)
    return message


def fine(subject: Subject) -> None:
    """A plain request is answered as ever."""
    agree("the next request", good(subject, subject.request(4)).token_ids, subject.greedy[:4])


def refused(subject: Subject, request: dict[str, Any], text: str = "", **how: str) -> str:
    """Refused by either engine with ``text`` in the error, and the next request is fine.

    The prompt's length is checked by the executor (llmRequest.cpp), lists and ids by the backend (utils.cc).
    """
    both = Refuses(text, "TensorRT-LLM's executor and backend refuse it, and so does the CPU engine")
    return as_expected(subject, subject.ask(request, **how), openvino=both, tensorrt=both)


def as_expected(subject: Subject, answer: Answer, *, openvino: Expected, tensorrt: Expected) -> str:
    """Hold an answer against what this engine does, then ask for another one; raises Disagreement."""
    answer.check_whole()
    expected = openvino if subject.engine == OPENVINO else tensorrt
    error = answer.error
    if isinstance(expected, Refuses):
        if error is None:
            raise Disagreement(f"it was answered, and should be refused ({expected.source})")
        if expected.text not in error:
            raise Disagreement(f"it was refused with {error!r}, and {expected.text!r} was expected in that")
    elif isinstance(expected, Answers):
        if error is not None:
            raise Disagreement(f"it was refused with {error!r} ({expected.source})")
        expected.holds(answer)
    elif error is None:
        agree("how many tokens", len(answer.token_ids), expected.tokens)
    fine(subject)
    return f"{'refused: ' + error if error else 'answered'} ({expected.source})"
