"""Cases about every way in which an answer can end, through each model, over both transports, streamed and whole.

An end token is an end and no output: TensorRT-LLM's sampling kernels do not count it in the sequence's length, and the
CPU engine leaves it out. Stop words are output of the engine; the text model leaves them out of the text.

What must come is known from the engine's own tokens and the tokenizer: a text is the decoding of the ids that
``tensorrt_llm`` gives for the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_client.conformance import generate
from minitron_client.conformance.answers import agree, answered, first_new
from minitron_client.conformance.subject import (
    ENGINE,
    ENSEMBLE,
    TEXT_MODEL,
    Disagreement,
    NotApplicable,
    RefusedByServer,
    Subject,
)

GRPC, HTTP = "gRPC", "HTTP"
_TEXT = "In the beginning God created the heaven and the earth."
_LAST_WORDS = "The grace of our Lord Jesus Christ be with you all. Amen.\n"
_TOKENS = 24
_LONGEST, _SEEDS = 256, 16
# The engine's name of what the text models call otherwise.
_NAMES = {"max_tokens": "request_output_len", "top_k": "runtime_top_k", "top_p": "runtime_top_p"}


@dataclass(frozen=True)
class Route:
    """How a request reaches the engine."""

    model: str
    transport: str
    streams: bool

    def __str__(self) -> str:
        return f"{self.model}, {self.transport}, {'streamed' if self.streams else 'whole'}"


@dataclass(frozen=True)
class Ended:
    """An answer to its end: ``token_ids`` from ``tensorrt_llm``, ``text`` from the others; ``tokens``: as counted."""

    token_ids: list[int]
    text: str
    tokens: int
    error: str | None


def routes(subject: Subject, *models: str) -> list[Route]:
    """All that this server has, HTTP where its address is known; raises NotApplicable without any."""
    transports = (GRPC, HTTP) if subject.http_url else (GRPC,)
    found = [
        Route(model, transport, streams)
        for model in models or (ENGINE, TEXT_MODEL, ENSEMBLE)
        if model in subject.models
        for transport in transports
        for streams in (True, False)
    ]
    if not found:
        raise NotApplicable(f"the server has none of the models {', '.join(models)}")
    return found


def ask(subject: Subject, route: Route, prompt: str = _TEXT, **asked: Any) -> Ended:
    """Ask in a way; names are those of the text models. Raises RefusedByServer where a stream breaks."""
    more = {"exclude_input_in_output": True, "return_num_output_tokens": True, **asked}
    if route.model == ENGINE:
        request = {_NAMES.get(name, name): value for name, value in more.items()} | {"streaming": route.streams}
        request |= {"input_ids": subject.encode(prompt), "input_lengths": len(subject.encode(prompt))}
    else:
        request = more | {"text_input": prompt, "stream": route.streams}
    return (_over_http if route.transport == HTTP else _over_grpc)(subject, route, request)


def _over_grpc(subject: Subject, route: Route, request: Mapping[str, Any]) -> Ended:
    answer = subject.ask(request, model=route.model)
    answer.check_whole()
    return Ended(
        [] if route.model != ENGINE else answer.token_ids, "" if route.model == ENGINE else answer.text,
        sum(int(one["num_output_tokens"].sum()) for one in answer.responses), answer.error,
    )  # fmt: skip


def _over_http(subject: Subject, route: Route, request: Mapping[str, Any]) -> Ended:
    events = subject.generate(request, model=route.model)
    told = list(events)
    errors = [str(one["error"]) for one in told if "error" in one]
    if errors and told[-1].get("error") != errors[0]:
        raise Disagreement(f"{route}: {len(told)} events, and the error {errors[0]!r} is not the last of them")
    if bool(errors) and not route.streams and events.status == 200:
        raise Disagreement(f"{route}: HTTP status 200 with the error {errors[0]!r}")
    all_of = {
        name: [value for one in told for value in generate.values(one, name)]
        for name in ("output_ids", "text_output", "num_output_tokens")
    }
    return Ended(all_of["output_ids"], "".join(all_of["text_output"]), sum(all_of["num_output_tokens"]),
                 errors[0] if errors else None)  # fmt: skip


def _each(subject: Subject, check: Callable[[Route], None], *models: str) -> str:
    """Check every way; raises Disagreement that names the one that failed."""
    tried = routes(subject, *models)
    for route in tried:
        try:
            check(route)
        except (Disagreement, RefusedByServer) as error:
            raise Disagreement(f"{route}: {error}") from None
    return f"{len(tried)} ways" + ("" if subject.http_url else ", gRPC alone (--http-url gives HTTP)")


def _agree(
    subject: Subject, route: Route, answer: Ended, ids: list[int], prompt: str = _TEXT, *, counts: bool = True
) -> None:
    """The answer is ``ids``, or their text, and counts as many."""
    agree("error", answer.error, None)
    if counts:
        agree("tokens counted", answer.tokens, len(ids))
    if route.model == ENGINE:
        agree("tokens", answer.token_ids, ids)
    elif route.model == TEXT_MODEL:
        before = subject.decode(subject.encode(prompt))
        agree("text", answer.text, subject.decode([*subject.encode(prompt), *ids]).removeprefix(before))
    elif route.streams:  # the ensemble's postprocessing decodes each response by itself and loses spaces
        agree("text without spaces", _squeezed(answer.text), _squeezed("".join(subject.decode([one]) for one in ids)))
    else:
        agree("text", answer.text, subject.decode(ids))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _ids(subject: Subject, prompt: str = _TEXT, **asked: Any) -> list[int]:
    """What the engine itself gives, whole."""
    answer = ask(subject, Route(ENGINE, GRPC, False), prompt, **asked)
    agree("the engine's own answer", answer.error, None)
    return answer.token_ids


def length(subject: Subject) -> str:
    """As many tokens as were asked for."""
    ids = _ids(subject, max_tokens=_TOKENS, end_id=-1)
    agree("how many tokens", len(ids), _TOKENS)

    def check(route: Route) -> None:
        _agree(subject, route, ask(subject, route, max_tokens=_TOKENS, end_id=-1), ids)

    return f"{_TOKENS} tokens, {_each(subject, check)}"


def end_id(subject: Subject) -> str:
    """The end token that a request names is not in the answer."""
    ids = _ids(subject, max_tokens=_TOKENS, end_id=-1)
    place = first_new(ids)

    def check(route: Route) -> None:
        _agree(subject, route, ask(subject, route, max_tokens=_TOKENS, end_id=ids[place]), ids[:place])

    return f"ended before token {place + 1}, {_each(subject, check)}"


def end_first(subject: Subject) -> str:
    """The first token is the end: an answer without a token is an answer."""
    end = _ids(subject, max_tokens=1, end_id=-1)[0]

    def check(route: Route) -> None:
        _agree(subject, route, ask(subject, route, max_tokens=_TOKENS, end_id=end), [])

    return f"no token, {_each(subject, check)}"


def end_own(subject: Subject) -> str:
    """The text models know the model's own end tokens; whichever of them comes, it is an end."""
    seed, ids = _ended_by_itself(subject)

    def check(route: Route) -> None:
        # The engine counts all end tokens but the first as output, and the ensemble counts as the engine does.
        counts = route.model == TEXT_MODEL or len(subject.end_ids) == 1
        _agree(subject, route, ask(subject, route, _LAST_WORDS, **_sampled(seed)), ids, _LAST_WORDS, counts=counts)

    return f"ended after {len(ids)} of {_LONGEST} tokens (seed {seed}), {_each(subject, check, TEXT_MODEL, ENSEMBLE)}"


def _sampled(seed: int) -> dict[str, Any]:
    return {"max_tokens": _LONGEST, "temperature": 1.0, "top_p": 1.0, "seed": seed}


def _ended_by_itself(subject: Subject) -> tuple[int, list[int]]:
    """A seed with which the model ends by itself, and its tokens until then."""
    if not subject.end_ids:
        raise NotApplicable("the tokenizer has no end token")
    for seed in range(_SEEDS):
        ids = _ids(subject, _LAST_WORDS, **_sampled(seed), end_id=-1)
        place = next((place for place, token in enumerate(ids) if token in subject.end_ids), None)
        if place is not None:
            return seed, ids[:place]
    raise NotApplicable(f"in none of {_SEEDS} tries of {_LONGEST} tokens did the model end by itself")


def stop_ids(subject: Subject) -> str:
    """A word of two tokens ends the engine's answer; its tokens are in it."""
    place = first_new(subject.greedy, 3)
    word = subject.greedy[place : place + 2]
    lists = np.array([[[*word, 7], [2, 3, -1]]], np.int32)
    answer = answered(subject, subject.request(len(subject.greedy), stop_words_list=lists))
    agree("tokens with a stop list", answer.token_ids, subject.greedy[: _end_of(subject.greedy, word, 7)])
    none = answered(subject, subject.request(6, stop_words_list=np.zeros((1, 2, 0), np.int32)))
    agree("tokens with an empty stop list", none.token_ids, subject.greedy[:6])
    return f"ended after the word {word}"


def _end_of(tokens: list[int], word: list[int], single: int) -> int:
    """Where the first of the two words of the list ends."""
    pairs = [at + 2 for at in range(len(tokens) - 1) if tokens[at : at + 2] == word]
    singles = [at + 1 for at, token in enumerate(tokens) if token == single]
    return min([*pairs, *singles])


def stop_words(subject: Subject) -> str:
    """The text model's text ends before the stop string; the ensemble's behind it, where the tokenizer spells it so."""
    whole = ask(subject, Route(TEXT_MODEL, GRPC, False), max_tokens=_TOKENS, end_id=-1)
    agree("error", whole.error, None)
    words = whole.text.split()
    word = words[len(words) // 2] if len(words) > 2 else whole.text[len(whole.text) // 2 :]
    until = whole.text[: whole.text.index(word)]

    def check(route: Route) -> None:
        answer = ask(subject, route, max_tokens=_TOKENS, end_id=-1, stop_words=[word])
        agree("error", answer.error, None)
        if route.model == TEXT_MODEL:
            agree(f"text before {word!r}", answer.text, until)
        else:
            text = _squeezed(answer.text)
            agree(f"text up to {word!r} without spaces", text, _squeezed(until + word))

    return f"ended at {word!r}, {_each(subject, check, TEXT_MODEL, ENSEMBLE)}"


def refusal(subject: Subject) -> str:
    """An error in place of the first token ends the request, and the next one is answered."""
    ids = _ids(subject, max_tokens=4, end_id=-1)

    def check(route: Route) -> None:
        answer = ask(subject, route, max_tokens=0)
        if answer.error is None:
            raise Disagreement("an output of no tokens was asked for, and it was answered")
        agree("what came before the error", (answer.token_ids, answer.text), ([], ""))
        _agree(subject, route, ask(subject, route, max_tokens=4, end_id=-1), ids)

    return f"refused, {_each(subject, check)}"
