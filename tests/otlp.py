"""A collector of OpenTelemetry's protocol over HTTP: what is posted is decoded, by opentelemetry-proto or as JSON.

Encodings, field names and ids (hexadecimal in JSON): opentelemetry.io/docs/specs/otlp.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span that came; ids in hexadecimal, ``events``: their attributes by name."""

    service: str
    name: str
    kind: int
    trace: str
    span: str
    parent: str
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    is_error: bool


class Collector:
    """What came: ``spans`` and the bodies as they were (``raw``)."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw: list[bytes] = []
        self.url = ""

    def named(self, name: str, count: int = 1) -> list[Span]:
        """Spans of this name, as soon as there are so many; raises AssertionError."""
        until = time.monotonic() + 30
        while len(found := [one for one in self.spans if one.name == name]) < count:
            assert time.monotonic() < until, f"no {name!r} among {[one.name for one in self.spans]}"
            time.sleep(0.02)
        return found

    def take(self, raw: bytes, content_type: str) -> None:
        """A body that was posted."""
        if content_type == "application/json":
            document = json.loads(raw)
            for span in _all_spans(document):
                for name in ("traceId", "spanId", "parentSpanId"):
                    span[name] = base64.b64encode(bytes.fromhex(span.get(name, ""))).decode()
            message = json_format.ParseDict(document, ExportTraceServiceRequest())
        else:
            assert content_type == "application/x-protobuf"
            message = ExportTraceServiceRequest.FromString(raw)
        self.raw.append(raw)
        for resource in message.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_span(service, one) for one in scope.spans]


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """One that listens on a free port of this machine."""
    one = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                raw = gzip.decompress(raw)
            status = 200 if self.path == "/v1/traces" else 404
            if status == 200:
                one.take(raw, self.headers["content-type"])
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield one
    server.shutdown()
    server.server_close()
    thread.join()


def _all_spans(document: Any) -> Iterator[dict[str, Any]]:
    for resource in document["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            yield from scope["spans"]


def _span(service: str, span: Any) -> Span:
    return Span(
        service, span.name, span.kind, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        _values(span.attributes), {event.name: _values(event.attributes) for event in span.events},
        span.status.code == 2,
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)
