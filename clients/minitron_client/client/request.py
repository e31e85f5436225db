"""What is asked of a model: a prompt or token ids, and how to sample; checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from minitron.errors import InvalidRequest
from minitron.text import trace_context

_INT32 = (1 << 31) - 1
_UINT64 = (1 << 64) - 1

_WHOLE = {
    "max_tokens": (1, _INT32), "min_tokens": (0, _INT32), "end_id": (-1, _INT32), "pad_id": (-1, _INT32),
    "top_k": (0, _INT32), "top_p_reset_id": (0, _INT32), "seed": (0, _UINT64), "beam_width": (1, _INT32),
    "num_return_sequences": (1, _INT32), "no_repeat_ngram_size": (1, _INT32),
}  # fmt: skip
_FROM_0 = ("of at least 0", lambda value: value >= 0)
_ABOVE_0 = ("above 0", lambda value: value > 0)
_SHARE = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_FINITE = ("that is finite", lambda value: True)
_REAL: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": _FROM_0, "top_p": _SHARE, "top_p_decay": _SHARE, "repetition_penalty": _ABOVE_0,
    "presence_penalty": _FINITE, "frequency_penalty": _FINITE, "length_penalty": _FINITE,
    "beam_search_diversity_rate": _FROM_0,
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request; None leaves a setting to the server. Lengths are in tokens of the served tokenizer.

    Give ``prompt`` to the models that take text, ``input_ids`` to ``tensorrt_llm`` itself. ``stop_words`` and
    ``bad_words`` are for the former, ``stop_ids`` and ``bad_ids`` (each a sequence of token ids) for the latter.
    ``end_id`` None means the tokenizer's own where the model takes text, and no end at all where it takes ids;
    ``ignore_end`` generates past it. ``embedding_bias`` adds a number to the logits of words. ``traceparent``: the
    trace that it belongs to (W3C), where that is not the one of the caller's own span.

    Names and meaning are those of TensorRT-LLM's Triton backend 1.2. Left out on purpose: ``early_stopping`` (the
    backend reads four bytes of a one-byte tensor) and ``runtime_top_p_min`` (the backend never reads it).
    """

    prompt: str | None = None
    _: KW_ONLY
    input_ids: Sequence[int] | None = None
    max_tokens: int = 128
    min_tokens: int | None = None
    end_id: int | None = None
    pad_id: int | None = None
    ignore_end: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    top_p_decay: float | None = None
    top_p_reset_id: int | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    length_penalty: float | None = None
    beam_width: int | None = None
    beam_search_diversity_rate: float | None = None
    num_return_sequences: int | None = None
    stop_words: Sequence[str] | None = None
    bad_words: Sequence[str] | None = None
    stop_ids: Sequence[Sequence[int]] | None = None
    bad_ids: Sequence[Sequence[int]] | None = None
    embedding_bias: Mapping[str, float] | None = None
    return_log_probs: bool = False
    return_perf_metrics: bool = False
    request_id: str | None = None
    traceparent: str | None = None

    def check(self) -> None:
        """Raise InvalidRequest for what no server would accept."""
        checks = (self._prompt_problem, self._number_problems, self._combined_problem, self._words_problem)
        problem = next(filter(None, (check() for check in checks)), None)
        if problem:
            raise InvalidRequest(f"the request was not sent: {problem}")

    def _prompt_problem(self) -> str | None:
        if (self.prompt is None) == (self.input_ids is None):
            return "give either a prompt or input_ids"
        if self.prompt is not None:
            return _text_problem("prompt", self.prompt)
        return _ids_problem("input_ids", self.input_ids)

    def _number_problems(self) -> str | None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and not (_is(value, int) and low <= value <= high):
                return f"{name} is {value!r}, and a whole number from {low} to {high} is needed"
        for name, (range_name, fits) in _REAL.items():
            value = getattr(self, name)
            if value is not None and not (_is(value, int, float) and math.isfinite(value) and fits(value)):
                return f"{name} is {value!r}, and a number {range_name} is needed"
        return None

    def _combined_problem(self) -> str | None:
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            return f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
        if self.ignore_end and self.end_id is not None:
            return "ignore_end and end_id contradict each other"
        if (self.num_return_sequences or 1) > 1 and (self.beam_width or 1) > 1:
            return "num_return_sequences and beam_width cannot both be above 1"
        if self.request_id is not None and not (isinstance(self.request_id, str) and self.request_id):
            return f"request_id is {self.request_id!r}, and a string that is not empty is needed"
        if self.traceparent is not None and not trace_context.received([str(self.traceparent)]):
            return f"traceparent is {self.traceparent!r}, which is none as W3C's Trace Context has it"
        return None

    def _words_problem(self) -> str | None:
        for name, problem_of in _LISTS.items():
            values = getattr(self, name) or ()
            if isinstance(values, (str, bytes)):
                return f"{name} is {values!r}, and a list is needed"
            if problem := next(filter(None, (problem_of(name, value) for value in values)), None):
                return problem
        for word, weight in (self.embedding_bias or {}).items():
            if _text_problem("embedding_bias", word) or not (_is(weight, int, float) and math.isfinite(weight)):
                return f"embedding_bias of {word!r} is {weight!r}, and a word with a finite number is needed"
        return None


def as_request(asked: str | Request, options: dict[str, Any]) -> Request:
    """A prompt with options, or a request as it is (options then replace its fields); raises InvalidRequest."""
    try:
        return replace(asked, **options) if isinstance(asked, Request) else Request(asked, **options)
    except TypeError as error:
        raise InvalidRequest(f"the request was not sent: {error}") from None


def _is(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _text_problem(name: str, text: object) -> str | None:
    if not isinstance(text, str) or not text:
        return f"{name} holds {text!r}, and text that is not empty is needed"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{name} is no valid Unicode at character {error.start}"
    return None


def _ids_problem(name: str, ids: Any) -> str | None:
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__") or not len(ids):
        return f"{name} holds {ids!r}, and a sequence of at least one token id is needed"
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= int(token) <= _INT32:
            return f"{name} holds {token!r}, which is no token id"
    return None


_LISTS = {"stop_words": _text_problem, "bad_words": _text_problem, "stop_ids": _ids_problem, "bad_ids": _ids_problem}
