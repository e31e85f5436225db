"""What the gateway counts, in Prometheus' text; with several workers it is summed over them.

Prometheus' client keeps the values of several processes in files of the folder that PROMETHEUS_MULTIPROC_DIR names,
and looks for that name when it is imported: ``serving`` sets it for workers before.
"""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        name = "minitron_gateway_"
        self.requests = Counter(name + "requests", "Requests answered", ["endpoint", "status"], registry=own)
        self.broken = Counter(name + "broken_streams", "Streams that ended with an error event", registry=own)
        self.left = Counter(name + "clients_left", "Requests whose client left before the end", registry=own)
        self.retries = Counter(name + "retries", "Requests sent to a second server", registry=own)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts", registry=own)
        self.completion_tokens = Counter(name + "completion_tokens", "Tokens generated", registry=own)
        self.first_event = Histogram(
            name + "time_to_first_event_seconds", "From a stream's request to its first event",
            buckets=_BUCKETS_S, registry=own,
        )  # fmt: skip
        self.streams = Gauge(
            name + "streams", "Sequences in flight", registry=own, multiprocess_mode="livesum"
        )  # fmt: skip
        self.upstream_ready = Gauge(
            name + "upstream_ready", "Whether a server takes requests", ["upstream"], registry=own,
            multiprocess_mode="livemin",
        )  # fmt: skip

    def text(self) -> bytes:
        """The page."""
        registry = self._registry
        if os.environ.get(FOLDER_VARIABLE):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
