"""What the gateway counts, in Prometheus' text; with several workers it is summed over them.

Prometheus' client keeps the values of several processes in files of the folder that PROMETHEUS_MULTIPROC_DIR names,
and looks for that name when it is imported: ``serving`` sets it for workers before.
"""

from __future__ import annotations

import math
import os
import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


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
            buckets=_FIRST_S, registry=own,
        )  # fmt: skip
        self.generated_tokens = Counter(
            name + "generated_tokens", "Tokens that servers sent, as they come", registry=own
        )
        self.first_token = Histogram(
            name + "time_to_first_token_seconds", "From a sequence's way to a server to its first token",
            buckets=_FIRST_S, registry=own,
        )  # fmt: skip
        self.next_token = Histogram(
            name + "inter_token_latency_seconds",
            "Time since the response before, over the tokens in this one; observed for each response",
            buckets=_NEXT_S, registry=own,
        )  # fmt: skip
        self.duration = Histogram(
            name + "request_duration_seconds", "From a request to the end of its answer, of those answered with 200",
            ["endpoint"], buckets=_WHOLE_S, registry=own,
        )  # fmt: skip
        self.waiting = Gauge(
            name + "sequences_waiting", "Sequences in flight without a token yet", registry=own,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.upstream_errors = Counter(
            name + "upstream_errors", "Requests that a server failed", ["upstream", "kind"], registry=own
        )
        self.streams = Gauge(
            name + "streams", "Sequences in flight", registry=own, multiprocess_mode="livesum"
        )  # fmt: skip
        self.upstream_ready = Gauge(
            name + "upstream_ready", "Whether a server takes requests", ["upstream"], registry=own,
            multiprocess_mode="livemin",
        )  # fmt: skip

    def timing(self) -> Timing:
        """The clock of a sequence that is sent to a server now."""
        return Timing(self)

    def forget_upstream(self, url: str) -> None:
        """A server that is no longer there is neither ready nor not."""
        if os.environ.get(FOLDER_VARIABLE):  # files of several processes forget no label
            self.upstream_ready.labels(url).set(math.nan)
        else:
            self.upstream_ready.remove(url)

    def text(self) -> bytes:
        """The page."""
        registry = self._registry
        if os.environ.get(FOLDER_VARIABLE):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class Timing:
    """When the tokens of one sequence came, counted into histograms."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._since, self._begun = metrics, time.perf_counter(), False
        metrics.waiting.inc()

    def came(self, tokens: int) -> None:
        """``tokens`` more are here, all at once."""
        if not tokens:
            return
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self._metrics.generated_tokens.inc(tokens)
        if self._begun:
            self._metrics.next_token.observe(passed / tokens)
            return
        self._begun = True
        self._metrics.waiting.dec()
        self._metrics.first_token.observe(passed)

    def end(self) -> None:
        """No more come, for whatever reason."""
        if not self._begun:
            self._metrics.waiting.dec()
