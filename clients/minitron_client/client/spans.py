"""The span of a request as its client sees it, where the application that uses the client traces itself.

Attributes: OpenTelemetry's semantic conventions for generative AI; no prompt, no answer, no stop string.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from minitron import tracing
from minitron.text import trace_context
from minitron_client.client.answer import Response
from minitron_client.client.request import Request


def begin(request: Request, model: str, url: str, *, stream: bool) -> tracing.Span:
    """Of the trace that the request names, else of the caller's own span; ``url``: of the server, or its HOST:PORT."""
    parent = trace_context.received([request.traceparent]) if request.traceparent else None
    where = urlsplit(url if "://" in url else f"//{url}")
    return tracing.begin(
        f"text_completion {model}", "client", parent,
        {
            "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "triton",
            "gen_ai.request.model": model, "gen_ai.request.stream": stream,
            "gen_ai.request.max_tokens": request.max_tokens, "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p, "gen_ai.request.top_k": request.top_k,
            "gen_ai.request.choice.count": request.num_return_sequences,
            "server.address": where.hostname, "server.port": where.port,
        },
    )  # fmt: skip


def end(span: tracing.Span, response: Response, error: BaseException | None) -> None:
    """Its request is over, with what came of the answer."""
    if error is not None:
        span.fail(type(error).__name__)
    timing = response.timing
    reasons = [one.finish_reason for one in response.outputs if one.finish_reason]
    counts = [one.token_count for one in response.outputs]
    span.set({
        "gen_ai.response.model": response.model, "gen_ai.response.id": response.request_id,
        "gen_ai.usage.input_tokens": response.input_token_count,
        "gen_ai.usage.output_tokens": None if None in counts else sum(count or 0 for count in counts),
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": None if timing.ttft_ns is None else timing.ttft_ns / 1e9,
    })  # fmt: skip
    span.end()
