"""Which error of ours a failure is. Triton gives stream errors no code and TensorRT-LLM gives all the same one, so the
texts decide (Triton 2.51 and TensorRT-LLM 1.2), and the gRPC status only where there is one and no text is known.
"""

from __future__ import annotations

import grpc

from minitron.errors import Cancelled, ClientError, DeadlineExceeded, InvalidRequest, NotReady, Rejected, StreamBroken
from minitron.text import proxy

_Texts = tuple[tuple[str, type[ClientError], str], ...]

_CALM = "the server allows fewer keepalive pings: give --keepalive 310 or more, or let 'minitron serve' start it"
_DEAD = "the server, or the line to it, is dead: it did not answer a keepalive ping, and the answer is incomplete"
# Part of the text (lower case), what it means, what to do. The first that occurs decides.
_TEXTS: _Texts = (
    ("maximum queue size", Rejected, "try again later"),
    ("exceeds maximum queue size", Rejected, "try again later"),
    ("queue full", Rejected, "try again later"),
    ("queue is full", Rejected, "try again later"),
    ("request timeout expired", Rejected, "it waited too long in the server's queue; try again later"),
    ("this protocol is restricted", InvalidRequest, "give the API key, under the name that follows 'protocol-'"),
    ("server is stopping", NotReady, "try again when it is back"),
    ("engine is stopping", NotReady, "try again when it is back"),
    ("that was answering was lost", StreamBroken, "the answer is incomplete"),
    ("server not ready", NotReady, "try again when it is back"),
    ("request for unknown model", NotReady, "'minitron serve' loads the models; --model names another"),
    ("is not available", NotReady, "'minitron serve' loads the models; --model names another"),
    ("is not ready", NotReady, "wait until the server has loaded it"),
    ("the engine takes", InvalidRequest, ""),
    ("exceeds maximum input length", InvalidRequest, "shorten the prompt"),
    ("max_seq_len", InvalidRequest, "shorten the prompt or lower max_tokens"),
    ("maximum sequence length", InvalidRequest, "shorten the prompt or lower max_tokens"),
    ("unexpected inference input", InvalidRequest, ""),
    ("inference input", InvalidRequest, ""),
    ("inputs but got", InvalidRequest, ""),
    ("unexpected shape", InvalidRequest, ""),
    ("doesn't support models with decoupled", InvalidRequest, ""),
    ("is not supported", InvalidRequest, ""),
    ("not supported by", InvalidRequest, ""),
    ("must be", InvalidRequest, ""),
    ("is needed", InvalidRequest, ""),
    ("is empty", InvalidRequest, ""),
    ("not valid utf-8", InvalidRequest, ""),
    ("cannot be streamed", InvalidRequest, ""),
    ("out of range", InvalidRequest, ""),
    ("cancelled", Cancelled, ""),
    ("canceled", Cancelled, ""),
)
# The same of what gRPC itself says of the connection; this comes first.
_LINE_TEXTS: _Texts = (
    ("handshake failed", NotReady, "check the TLS settings of both sides (--tls, --tls-ca, --tls-cert)"),
    (
        "failed to connect",
        NotReady,
        "check that the server runs (what 'minitron serve' started, 'minitron status' lists), "
        "its gRPC port, and TLS on both sides",
    ),
    ("errors resolving", NotReady, "check the host name"),
    ("dns resolution failed", NotReady, "check the host name"),
    ("http2 header with status", NotReady, "what answers there is no gRPC server"),
    ("too_many_pings", StreamBroken, _CALM),
    ("too many pings", StreamBroken, _CALM),
    ("keepalive", StreamBroken, _DEAD),
    ("ping timeout", StreamBroken, _DEAD),
)
_CODES: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotReady,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Rejected,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def of_text(text: str, url: str) -> ClientError:
    """The error that an error message of a stream means."""
    return _by_text(_LINE_TEXTS + _TEXTS, text, url) or ClientError(f"{url}: {_one_line(text)}")


def of_status(error: grpc.RpcError, url: str, *, streaming: bool = False, proxies: bool = True) -> ClientError:
    """The error that a failed call means; ``streaming`` where it was sent and its answer was being awaited.

    ``proxies``: whether its channel obeys those of the environment, which the message names where they matter.
    """
    code, text = error.code(), str(error.details() or "")
    proxied = proxy.advice(proxy.of_grpc(url), url) if proxies else ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{url}: no complete answer within the deadline{'' if streaming else proxied}")
    if line := _by_text(_LINE_TEXTS, text, url):
        return type(line)(f"{line}{proxied}")
    if known := _by_text(_TEXTS, text, url):
        return known
    if code is grpc.StatusCode.UNAVAILABLE:
        kind, advice = (StreamBroken, "the answer is incomplete") if streaming else (NotReady, "check that it runs")
        return kind(f"{url}: the connection ended ({_one_line(text)}); {advice}{proxied}")
    if streaming and code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return StreamBroken(f"{url}: the stream ended with an error ({_one_line(text)})")
    return _CODES.get(code, ClientError)(f"{url}: {_one_line(text)} ({code.name})")


def _by_text(texts: _Texts, text: str, url: str) -> ClientError | None:
    lower = text.lower()
    for part, kind, advice in texts:
        if part in lower:
            return kind(f"{url}: {_one_line(text)}" + (f"; {advice}" if advice else ""))
    return None


def _one_line(text: str) -> str:
    """The telling line: of a Python traceback (which the official BLS model sends) the last, else all in one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return lines[-1] if "Traceback" in text else " ".join(lines)
