"""Errors in the shape of OpenAI's API: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from minitron import failures
from minitron.errors import InvalidRequest, NotReady, Rejected
from minitron.text.engine import EngineCallError, EngineUnreachable
from minitron.text.errors import RequestError

#: Seconds after which a client may try again where nothing better is known.
RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "body_too_large", 429: "rate_limit_exceeded"}
_EXECUTOR = "due to the following error: "  # of TensorRT-LLM; what stands before it means nothing to a client
#: Parameters by the names that the engine and the text code have for them.
_PARAMETERS = {
    "embedding_bias": "logit_bias", "the bias": "logit_bias", "input_ids": "prompt", "input_lengths": "prompt",
    "num_return_sequences": "n", "request_output_len": "max_tokens", "return_context_logits": "logprobs",
    "return_log_probs": "logprobs", "runtime_top_k": "top_k", "runtime_top_p": "top_p", "stop_words_list": "stop",
} | {name: name for name in ("frequency_penalty", "min_tokens", "presence_penalty", "repetition_penalty", "seed",
                             "temperature", "top_k", "top_p")}  # fmt: skip
_NAMED = re.compile(rf"\b({'|'.join(_PARAMETERS)})\b")
#: What pydantic finds wrong with a number: the name of the limit, and how it is said.
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most"), "less_than": ("lt", "below"),
}  # fmt: skip


class Problem(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)

    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The same in bytes."""
        return json.dumps(self.document()).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What goes with it: when to try again, or that a key is to be shown (RFC 9110, 11.6.1)."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        return [(b"retry-after", str(RETRY_AFTER_S).encode())] if self.status in (429, 503) else []


def of_request(error: RequestError) -> Problem:
    """The text code refused the request."""
    return _in_openai_s_words(str(error))


def of_validation(error: ValidationError) -> Problem:
    """The body is not what the API takes: its first fault."""
    first = error.errors(include_url=False)[0]
    where, kind = ".".join(str(word) for word in first["loc"]), first["type"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = "is no parameter of this endpoint"
    if kind in _BOUNDS:  # the number as it was sent, however the engine would round it
        name, how = _BOUNDS[kind]
        message = f"{str(first['input'])[:40]} was sent; it must be {how} {first['ctx'][name]}"
    if not where:  # of the body as a whole; a check of ours begins with the parameter
        return Problem(400, message, param=message.partition(":")[0] if kind == "value_error" else None)
    return Problem(400, f"{where}: {message}", param=str(first["loc"][0]))


def of_engine(error: EngineCallError) -> Problem:
    """A server behind the gateway answered with an error."""
    text = str(error).partition(_EXECUTOR)[2] or str(error)
    kind = kind_of(error)
    if kind is InvalidRequest:
        return _in_openai_s_words(text)
    if kind is Rejected:
        return Problem(429, "the engine's queue is full")
    if kind is NotReady:
        return Problem(503, "no engine is ready")
    return Problem(500, f"the engine failed: {text}", code="engine_error")


def _in_openai_s_words(text: str) -> Problem:
    """A refusal, whose parameter is the first that it names."""
    named = _NAMED.search(text)
    message = _NAMED.sub(lambda found: _PARAMETERS[found[0]], text)
    return Problem(400, message, param=_PARAMETERS[named[0]] if named else None)


def lost() -> Problem:
    """A server is gone in the middle of an answer, whether or not another is there."""
    return Problem(503, "the server that was answering was lost in the middle of it; ask again for the whole answer")


def kind_of(error: EngineCallError) -> type[Exception]:
    """Which of the client's errors it is; Triton gives the errors of a stream no code."""
    return NotReady if isinstance(error, EngineUnreachable) else type(failures.of_text(str(error), ""))
