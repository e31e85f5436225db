"""Triton's own traces, in its mode ``opentelemetry``: the span of each request, its models' and their queues'.

Names of settings: Triton's user guide, "Server Trace". What 2.51 was seen to do with them: a request that comes with a
trace context is traced whatever the rate, and whatever its flag "sampled" says; spans go out over HTTP as JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from minitron import tracing
from minitron.errors import UsageError

#: Name of the server among others' spans.
SERVICE = "minitron-triton"
#: What the container's exporter reads by itself, where it is set here.
VARIABLES = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_RESOURCE_ATTRIBUTES")
# How long spans gather. Triton's own 5 s would lose as much at the end of a drain, when the process is ended at once.
_DELAY_MS = "1000"


@dataclass(frozen=True)
class Traces:
    """``url``: where spans are posted. ``rate``: every so many requests without a context are traced too, 0: none."""

    url: str
    rate: int = 0
    delay_ms: str = _DELAY_MS

    @classmethod
    def of(cls, rate: int, environment: Mapping[str, str] = os.environ) -> Traces | None:
        """Where OpenTelemetry's variables name an endpoint; raises UsageError."""
        if rate < 0:
            raise UsageError(f"--trace-rate {rate} is less than none; 0 traces what comes with a trace alone")
        url = tracing.endpoint(environment)
        return (url and cls(url, rate, environment.get("OTEL_BSP_SCHEDULE_DELAY") or _DELAY_MS)) or None

    @property
    def flags(self) -> list[str]:
        """As flags of tritonserver."""
        settings = (
            "mode=opentelemetry", "level=TIMESTAMPS", f"rate={self.rate}", f"opentelemetry,url={self.url}",
            f"opentelemetry,resource=service.name={SERVICE}",
            f"opentelemetry,bsp_schedule_delay={self.delay_ms}",
        )  # fmt: skip
        return [f"--trace-config={setting}" for setting in settings]
