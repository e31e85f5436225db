"""Cases about requests that end early, are wrong, or are too many.

After every one of them the next plain request must be answered as ever. Where the contract says that the C++ backend
does otherwise than the CPU engine, a case carries both expectations, each with its source.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_trtllm.conformance.answers import agree, first_new, good
from minitron_trtllm.conformance.subject import (
    OPENVINO,
    Answer,
    Call,
    Disagreement,
    NotApplicable,
    Subject,
    collect,
    wait_until,
)

_FULL = ("Maximum queue size of", "Exceeds maximum queue size")
_BIAS = 1e4
_UNSUPPORTED, _UNSUPPORTED_SOURCE = "not supported by the CPU engine", "docs/cpu-engine.md: OpenVINO GenAI cannot do it"
#: So many looks, 50 ms apart, without a change: longer than stats_check_period_ms, by which the count is updated.
_LOOKS = 10
_GROUP, _GROUP_PAUSE_S, _LAST_REFUSAL_S = 16, 0.05, 10.0


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
    before = _steps_at_rest(subject)
    call = subject.open(subject.request(subject.room, streaming=True))
    for _ in range(3):
        next(call)
    call.cancel()
    steps = _steps_at_rest(subject) - before
    if steps >= subject.room:
        raise Disagreement(f"{steps:.0f} steps were made for a client that had left after 3 of {subject.room} tokens")
    fine(subject)
    return f"left after 3 of {subject.room} tokens, at rest after {steps:.0f} steps"


def _steps_at_rest(subject: Subject) -> float:
    """The engine's count of steps once it does not move any more."""
    seen: list[float] = []

    def at_rest() -> bool:
        seen.append(subject.steps())
        return len(seen) > _LOOKS and len(set(seen[-_LOOKS:])) == 1

    wait_until(at_rest, "an engine at rest")
    return seen[-1]


def stop(subject: Subject) -> str:
    """A second request with ``stop`` and the same id; the first ends in good order, its id is free again."""
    name = uuid.uuid4().hex
    call = subject.open(subject.request(subject.room, streaming=True), request_id=name)
    next(call)
    for other in (uuid.uuid4().hex, name):
        stopped = subject.ask(subject.request(1, stop=True), request_id=other)
        agree(f"the answer to stop of {'the' if other == name else 'an unknown'} id", stopped.error, None)
    rest = collect(call)
    agree("the error of the stopped request", rest.error, None)
    if 1 + len(rest.token_ids) >= subject.room:
        raise Disagreement("the request ran to its end although it was stopped")
    fine(subject)
    return f"ended after {1 + len(rest.token_ids)} of {subject.room} tokens"


def stop_without_id(subject: Subject) -> str:
    """Which request should end?"""
    return refused(subject, subject.request(1, stop=True), request_id="")


def duplicate_id(subject: Subject) -> str:
    """Two live requests of one id."""
    name = uuid.uuid4().hex
    call = subject.open(subject.request(subject.room, streaming=True), request_id=name)
    next(call)
    try:
        second = subject.ask(subject.request(4), request_id=name)
    finally:
        call.cancel()
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
    """More long requests than run and wait; then all are left, and the next one is answered."""
    limit = subject.queue_limit
    if not limit:
        raise NotApplicable("this engine's queue has no limit (serving.max_queue_size, serving.executor_queue_policy)")
    # Triton's own queue, in front of a TensorRT engine's, has the same limit.
    most = 2 * limit + 4 * subject.limits.max_batch_size + 64
    with _Crowd(subject, most) as crowd:
        crowd.grow()
    if crowd.refusal is None:
        raise Disagreement(f"{crowd.size} requests were taken with a queue of {limit}")
    if not any(text in crowd.refusal for text in _FULL):
        raise Disagreement(f"the surplus was refused with {crowd.refusal!r}")
    wait_until(lambda: subject.ask(subject.request(4)).token_ids == subject.greedy[:4], "an answer after the rush")
    return f"refused after {crowd.size} requests with a queue of {limit}: {crowd.refusal}"


class _Crowd:
    """Whole, long requests at once, each waited for by a thread; leaving the block cancels them all."""

    def __init__(self, subject: Subject, most: int) -> None:
        self._subject, self._most = subject, most
        self._calls: list[Call] = []
        self._threads: list[threading.Thread] = []
        self._refusals: list[str] = []

    @property
    def size(self) -> int:
        """How many were sent."""
        return len(self._calls)

    @property
    def refusal(self) -> str | None:
        """What the first one that was refused was told."""
        return self._refusals[0] if self._refusals else None

    def grow(self) -> None:
        """Send until one is refused, in small groups, so that the engine can take them in."""
        while self.size < self._most and not self._refusals:
            for _ in range(_GROUP):
                self._send()
            time.sleep(_GROUP_PAUSE_S)
        deadline = time.monotonic() + _LAST_REFUSAL_S
        while not self._refusals and time.monotonic() < deadline:
            time.sleep(_GROUP_PAUSE_S)

    def _send(self) -> None:
        call = self._subject.open(self._subject.request(self._subject.room))
        self._calls.append(call)
        self._threads.append(threading.Thread(target=self._wait, args=(call,), daemon=True))
        self._threads[-1].start()

    def _wait(self, call: Call) -> None:
        error = collect(call).error
        if error is not None and not self._leaving:
            self._refusals.append(error)

    _leaving = False

    def __enter__(self) -> _Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        for call in self._calls:
            call.cancel()
        for thread in self._threads:
            thread.join()


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
