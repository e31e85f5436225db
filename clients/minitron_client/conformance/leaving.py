"""Cases about requests that somebody ends before their answer is whole: a client that leaves, or a ``stop``.

Behind each of them the next plain request must be answered as ever.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from minitron_client.conformance.answers import agree, check_next_request, first
from minitron_client.conformance.generate import values
from minitron_client.conformance.requests import TRIES
from minitron_client.conformance.subject import (
    ENGINE,
    ENSEMBLE,
    PROMPT,
    TEXT_MODEL,
    Disagreement,
    Message,
    NotApplicable,
    Subject,
    wait_until,
)

#: An engine whose count of steps has not moved for so long is at rest; longer than stats_check_period_ms, by which the
#: count is updated, and than so many plain requests, where the machine is slow.
_REST_S, _REST_REQUESTS = 0.4, 10
#: Deadlines of a client that gives up: the second one for an engine that makes its longest answer within the first.
_SHORT_S, _SHORTER_S = 0.5, 0.1


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

    # An ensemble's request has to be told to stop.
    models = [model for model in (ENGINE, TEXT_MODEL) if model in subject.models]
    steps = [_left(subject, f"{model}, gRPC", partial(over_grpc, model)) for model in models]
    if subject.http_url:
        steps += [_left(subject, f"{model}, HTTP", partial(over_http, model)) for model in models]
    return f"left after 3 of {subject.room} tokens, at rest after at most {max(steps):.0f} steps, {len(steps)} ways"


def deadline(subject: Subject) -> str:
    """A client whose own time is over goes away as one that cancels."""

    def give_up(seconds: float) -> None:
        call = subject.stream(seconds)
        call.send(_long(subject, ENGINE))
        if call.rest().error is None:
            raise NotApplicable(f"{subject.room} tokens came within {seconds:g} s")

    try:
        seconds, steps = _SHORT_S, _left(subject, "deadline", partial(give_up, _SHORT_S))
    except NotApplicable:
        seconds, steps = _SHORTER_S, _left(subject, "deadline", partial(give_up, _SHORTER_S))
    return f"given up after {seconds:g} s, at rest after {steps:.0f} of {subject.room} steps"


def _long(subject: Subject, model: str) -> dict[str, Any]:
    """The longest answer that there can be, streamed and counted."""
    if model == ENGINE:
        return subject.request(subject.room, streaming=True, return_num_output_tokens=True)
    return {"text_input": PROMPT, "max_tokens": subject.text_room, "end_id": -1, "stream": True,
            "return_num_output_tokens": True}  # fmt: skip


def _left(subject: Subject, how: str, leave: Callable[[], None]) -> float:
    """Steps that the engine made for a client that left, fewer than a whole answer has.

    A client that was itself kept from leaving until the answer was complete shows nothing, so there are several tries.
    """
    for _ in range(TRIES):
        before = _steps_at_rest(subject)
        leave()
        steps = _steps_at_rest(subject) - before
        if steps < subject.text_room:
            return steps
    raise Disagreement(
        f"{how}: {steps:.0f} steps were made for a client that had left at the beginning of {subject.room} tokens"
    )


def _steps_at_rest(subject: Subject) -> float:
    """The engine's count of steps once it does not move any more.

    The plain request makes the count fresh (the C++ backend's stands still while nothing is generated) and tells how
    fast the engine is now.
    """
    started = time.monotonic()
    check_next_request(subject)
    still_s = max(_REST_S, _REST_REQUESTS * (time.monotonic() - started))
    count, since = subject.steps(), time.monotonic()

    def at_rest() -> bool:
        nonlocal count, since
        if (now := subject.steps()) != count:
            count, since = now, time.monotonic()
        return time.monotonic() - since > still_s

    wait_until(at_rest, "an engine at rest")
    return count


def stop(subject: Subject) -> str:
    """A second request with ``stop`` and the same id; the first ends in good order, its id is free again.

    Both are on one stream, so that the server's own order tells what came before what.
    """
    unknown = subject.ask(subject.stop_request(), request_id=uuid.uuid4().hex)
    agree("the answer to stop of an unknown id", unknown.error, None)
    told = [_stopped(subject, model) for model in (ENGINE, ENSEMBLE, TEXT_MODEL) if _can_stop(subject, model)]
    if subject.http_url:
        told += [_stopped_over_http(subject, model) for model in (ENGINE, ENSEMBLE) if model in subject.models]
    check_next_request(subject)
    return f"of {subject.room} tokens, so many before the stop was answered, and in all: {', '.join(told)}"


def _can_stop(subject: Subject, model: str) -> bool:
    """Upstream's text model takes no ``stop``: it gives its requests ids of its own."""
    return model in subject.models and (model != TEXT_MODEL or subject.takes(TEXT_MODEL, "stop"))


def _stopped(subject: Subject, model: str) -> str:
    for _ in range(TRIES):
        call = subject.stream()
        name = call.send(_long(subject, model), model=model)
        tokens = _count(first(call))
        call.send(subject.stop_request(model), model=TEXT_MODEL if model == TEXT_MODEL else ENGINE, request_id=name)
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
    raise Disagreement(f"{model}: a stop was answered only after {before} of {tokens} tokens, {TRIES} times")


def _stopped_over_http(subject: Subject, model: str) -> str:
    """Two connections have no order: only an answer that is cut short says something."""
    for _ in range(TRIES):
        name = uuid.uuid4().hex
        events = subject.generate({"id": name, **_long(subject, model)}, model=model)
        tokens = sum(values(next(events), "num_output_tokens"))
        stopped = list(subject.generate({"id": name, **subject.stop_request()}))
        agree(f"{model}, HTTP: errors of the stop", [one for one in stopped if "error" in one], [])
        tokens += sum(sum(values(one, "num_output_tokens")) for one in events)
        if tokens < subject.text_room:
            return f"{model} over HTTP {tokens}"
    raise Disagreement(f"{model}, HTTP: the request ran to its end although it was stopped, {TRIES} times")


def _count(message: Message) -> int:
    return int(message.outputs["num_output_tokens"].sum()) if "num_output_tokens" in message.outputs else 0
