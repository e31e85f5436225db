"""The span of a request to the gateway, by the semantic conventions of HTTP and of generative AI.

What was asked and what was answered is in none of the attributes: no text, no stop string, no word of a body.
"""

from __future__ import annotations

from starlette.requests import Request

from minitron import tracing
from minitron.text import trace_context
from minitron_gateway.generation import Generation
from minitron_gateway.problems import Problem

#: By the name of the endpoint.
_OPERATIONS = {"completions": "text_completion", "chat": "chat"}
LEFT = "client_left"


def begin(request: Request, endpoint: str) -> tracing.Span:
    """A span of the trace that the request came with, or of a new one; what this task asks of servers belongs to it."""
    headers, path = request.headers, request.url.path
    parent = trace_context.received(headers.getlist("traceparent"), headers.getlist("tracestate"))
    attributes = {
        "http.request.method": request.method, "http.route": path, "url.path": path,
        "url.scheme": request.url.scheme, "gen_ai.operation.name": _OPERATIONS[endpoint],
        "gen_ai.provider.name": "triton",
    }  # fmt: skip
    span = tracing.begin(f"{request.method} {path}", "server", parent, attributes)
    trace_context.CURRENT.set(span.headers)
    return span


def asked(span: tracing.Span, generation: Generation, model: str) -> None:
    """Its body has been read."""
    sampling = generation.sampling
    span.set({
        "gen_ai.request.model": model, "gen_ai.response.model": model,
        "gen_ai.request.stream": generation.streams, "gen_ai.request.choice.count": generation.choices,
        "gen_ai.request.max_tokens": sampling.max_tokens, "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p), "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
    })  # fmt: skip


def first_token(span: tracing.Span, after_s: float) -> None:
    """The first token of any of its sequences came so long after the request."""
    span.event("first_token", {"gen_ai.response.time_to_first_chunk": after_s})


def answered(span: tracing.Span, generation: Generation) -> None:
    """As much as was made of it."""
    span.set({
        "gen_ai.usage.output_tokens": generation.tokens,
        "gen_ai.response.finish_reasons": generation.finishes or None,
    })  # fmt: skip


def failed(span: tracing.Span, problem: Problem, *, broken: bool) -> None:
    """A server's fault, or a stream that broke, makes a span an error; a client's fault is a status alone."""
    if broken or problem.status >= 500:
        span.fail(str(problem.status))
