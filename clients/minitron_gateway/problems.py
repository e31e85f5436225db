"""Errors in the shape of OpenAI's API: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from minitron import failures
from minitron.errors import InvalidRequest, NotReady, Rejected
from minitron.text.engine import EngineError, EngineUnreachable
from minitron.text.errors import RequestError

#: Seconds after which a client may try again where nothing better is known.
RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "body_too_large", 429: "rate_limit_exceeded"}
_EXECUTOR = "due to the following error: "  # of TensorRT-LLM; what stands before it means nothing to a client


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
        """What goes with it: when to try again."""
        return [(b"retry-after", str(RETRY_AFTER_S).encode())] if self.status in (429, 503) else []


def of_request(error: RequestError) -> Problem:
    """The text code refused the request."""
    return Problem(400, str(error))


def of_validation(error: ValidationError) -> Problem:
    """The body is not what the API takes: its first fault."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(word) for word in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is no parameter of this endpoint"
    return Problem(400, f"{where}: {message}" if where else message, param=str(first["loc"][0]) if where else None)


def of_engine(error: EngineError) -> Problem:
    """A server behind the gateway answered with an error."""
    text = str(error).partition(_EXECUTOR)[2] or str(error)
    kind = kind_of(error)
    if kind is InvalidRequest:
        return Problem(400, text)
    if kind is Rejected:
        return Problem(429, "the engine's queue is full")
    if kind is NotReady:
        return Problem(503, "no engine is ready")
    return Problem(500, f"the engine failed: {text}", code="engine_error")


def kind_of(error: EngineError) -> type[Exception]:
    """Which of the client's errors it is; Triton gives the errors of a stream no code."""
    return NotReady if isinstance(error, EngineUnreachable) else type(failures.of_text(str(error), ""))
