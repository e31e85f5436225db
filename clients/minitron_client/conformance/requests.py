"""Cases about requests that are wrong, or too many.

After every one of them the next plain request must be answered as ever. Where the contract says that the C++ backend
does otherwise than the CPU engine, a case carries both expectations, each with its source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_client.conformance.answers import agree, check_next_request, first, first_new
from minitron_client.conformance.subject import OPENVINO, Answer, Call, Disagreement, NotApplicable, Subject, wait_until

_FULL = ("Maximum queue size of", "Exceeds maximum queue size")
_BIAS = 1e4
_UNSUPPORTED, _UNSUPPORTED_SOURCE = "not supported by the CPU engine", "docs/cpu-engine.md: OpenVINO GenAI cannot do it"
#: Where an answer may be over before the client could do something about it, it is tried again so often.
TRIES = 3
_GROUP = 16


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


def stop_without_id(subject: Subject) -> str:
    """Which request should end?"""
    return refused(subject, subject.request(1, stop=True), request_id="")


def duplicate_id(subject: Subject) -> str:
    """Two live requests of one id, on one stream: the first must go on when the second has been answered."""
    for _ in range(TRIES):
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
        call.send(subject.stop_request(), request_id=name)
        call.rest()
        if alive:
            break
    else:
        raise NotApplicable(f"the first of two requests was over before the second was answered, {TRIES} times")
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
    """One token more than the engine takes; and a TensorRT engine takes more than the max_input_len of its build."""
    longest, built = subject.longest_prompt, subject.limits.max_input_len
    if longest > built:
        answer = subject.ask(subject.request(1, subject.prompt_of(built + 1)))
        if answer.error is not None:
            raise Disagreement(
                f"{built + 1} tokens were refused ({answer.error}): max_input_len {built} is no limit of the runtime, "
                f"which takes {longest} (trtGptModel.h; 'TRTGptModel maxInputLen' in the log)"
            )
        answer.check_whole()
    said = refused(subject, subject.request(1, subject.prompt_of(longest + 1)), "exceed")
    return f"{longest} tokens are the limit, {built} that of the build; {said}"


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
            call.send(subject.stop_request(), request_id=name)
        refused = bool(_refused_by_now(subject, call))


def _refused_by_now(subject: Subject, call: Call) -> list[str]:
    """Stop nobody, and read on until that is answered: the errors until then."""
    name = call.send(subject.stop_request())
    errors = []
    for message in call:
        if message.error:
            errors.append(message.error)
        if message.id == name:
            break
    return errors


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
    check_next_request(subject)
    return f"{'refused: ' + error if error else 'answered'} ({expected.source})"
