"""Spans by OpenTelemetry. Without an endpoint to send them to nothing of it is imported, and nothing is made or sent.

A program that is to send spans calls ``start``; the variables of OpenTelemetry's own specification say whether and
where to (opentelemetry.io/docs/specs/otel/protocol/exporter). The client library makes spans where the application
that uses it has imported OpenTelemetry, in the way that this one chose. Spans hold numbers and names, never a prompt
or an answer.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

from minitron import extras
from minitron.text.trace_context import Headers
from minitron.version import VERSION

log = logging.getLogger(__name__)

_API = "opentelemetry.trace"
_NAME = "minitron"


def endpoint(environment: Mapping[str, str] = os.environ) -> str | None:
    """The URL that spans are posted to; None: traces are off."""

    def value(name: str) -> str:
        return environment.get(name, "").strip()

    exporters = value("OTEL_TRACES_EXPORTER") or "otlp"
    if value("OTEL_SDK_DISABLED").lower() == "true" or "otlp" not in exporters.split(","):
        return None
    base = value("OTEL_EXPORTER_OTLP_ENDPOINT")
    return value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (base and base.rstrip("/") + "/v1/traces") or None


def start(service: str) -> None:
    """Let this process send spans as ``service``, where an endpoint is named; the last ones go out when it ends.

    Called once in a process, by whoever owns it. What keeps traces from being sent is a warning and no error: nobody's
    answers depend on them.
    """
    url = endpoint()
    if url is None:
        return
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol == "grpc":
        log.warning("no traces are sent: OTEL_EXPORTER_OTLP_PROTOCOL is grpc, and only http/protobuf is spoken here")
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces are sent to %s: %s is not installed; %s", url, error.name, extras.install("otel"))
        return
    resource = Resource.create({"service.version": VERSION})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": service}))  # the environment's own name comes first
    try:
        provider = TracerProvider(resource=resource)  # which registers its own end with atexit
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        log.warning("no traces are sent to %s: a variable OTEL_… has a value that cannot be (%s)", url, error)
        return
    trace.set_tracer_provider(provider)


class Span:
    """A span that has begun or, where nobody traces, only the context that is handed on.

    ``headers``: what the requests made within it go out with.
    """

    def __init__(self, span: Any, headers: Headers) -> None:
        self._span, self.headers = span, headers

    @property
    def records(self) -> bool:
        """Whether anybody will see what it is told."""
        return self._span is not None

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes; those that are None are not known."""
        if self._span is not None:
            self._span.set_attributes(_known(attributes))

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Something happened now."""
        if self._span is not None:
            self._span.add_event(name, _known(attributes))

    def fail(self, kind: str) -> None:
        """It ended with an error of this kind (its message may quote a prompt, so it stays out)."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", kind)
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """It is over; only the first time counts."""
        if self._span is not None:
            self._span.end()
            self._span = None


def begin(name: str, kind: Literal["client", "server"], parent: Headers | None, attributes: Mapping[str, Any]) -> Span:
    """A span of the trace in ``parent``; without one, of this task's own span (None), or of a new trace (empty)."""
    api = sys.modules.get(_API)
    if api is None:
        return Span(None, parent or ())
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = TraceContextTextMapPropagator()
    context = None if parent is None else headers.extract(dict(parent))
    span = api.get_tracer(_NAME, VERSION).start_span(
        name, context, api.SpanKind[kind.upper()], attributes=_known(attributes)
    )
    out: dict[str, str] = {}
    headers.inject(out, api.set_span_in_context(span, context))
    return Span(span if span.is_recording() else None, tuple(out.items()))


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
