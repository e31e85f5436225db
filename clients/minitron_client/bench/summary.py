"""What many records add up to. Nothing is rounded on the way: every latency is kept, in whole ns.

A value takes 8 bytes, and an answer has as many as it has responses (of ITL) and six more; with a sorted copy and the
times that stalls are found in, a run of ten million responses needs some 320 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minitron_client.bench.profile import Slo
from minitron_client.bench.record import METRICS, OK, Record
from minitron_client.bench.statistics import PERCENTILES, enough, percentile

_PARTS = 10


@dataclass(frozen=True)
class Window:
    """The steady part of a run, ns on the clock of its records: ramp-up and drain lie outside."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) / 1e9

    def holds(self, time_ns: int) -> bool:
        """Whether a moment lies within."""
        return self.start_ns <= time_ns < self.end_ns

    def part(self, time_ns: int) -> int:
        """Which tenth of it a moment within it belongs to."""
        return (time_ns - self.start_ns) * _PARTS // max(self.end_ns - self.start_ns, 1)


def _arrays() -> dict[str, array[int]]:
    return {name: array("q") for name in METRICS}


@dataclass
class Summary:
    """Counts and latencies of the requests that were meant for the window, and what was completed inside it.

    ``sent`` and ``outcomes`` count every request of the run. ``in_window``, ``good`` (met the SLO) and ``latencies``
    (ns) those meant for the window; ``completed`` and ``tokens`` what was received inside it, whenever it was sent.
    ``ttft_parts``: TTFT in each tenth of the window.
    """

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    all_tokens: int = 0
    in_window: int = 0
    good: int = 0
    completed: int = 0
    tokens: int = 0
    uncounted: int = 0
    input_tokens: int = 0
    latencies: dict[str, array[int]] = field(default_factory=_arrays)
    ttft_parts: list[array[int]] = field(default_factory=lambda: [array("q") for _ in range(_PARTS)])

    def add(self, record: Record, window: Window, slo: Slo) -> None:
        """Count one record."""
        self.sent += 1
        self.outcomes[record.outcome] += 1
        if record.outcome == OK and window.holds(record.ended_ns):
            self.completed += 1
        self.tokens += sum(count or 0 for time_ns, count in record.responses if window.holds(time_ns))
        self.all_tokens += record.timing.output_tokens or 0
        self.uncounted += record.outcome == OK and not record.timing.counted
        self.input_tokens += record.input_tokens or 0
        if window.holds(record.intended_ns):
            self.in_window += 1
            self.good += meets(record, slo)
            self._add_latencies(record, window)

    def _add_latencies(self, record: Record, window: Window) -> None:
        for name, metric in METRICS.items():
            if record.outcome == OK or name == "send_lateness":
                values = metric.values(record)
                self.latencies[name].extend(values)
                if name == "ttft":
                    self.ttft_parts[window.part(record.intended_ns)].extend(values)

    def merge(self, other: Summary) -> None:
        """Add what ``other`` counted."""
        for name in ("sent", "all_tokens", "in_window", "good", "completed", "tokens", "uncounted", "input_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.outcomes.update(other.outcomes)
        for name, values in other.latencies.items():
            self.latencies[name].extend(values)
        for mine, theirs in zip(self.ttft_parts, other.ttft_parts, strict=True):
            mine.extend(theirs)

    def percentiles_ms(self, name: str) -> dict[str, float | None] | None:
        """p50, p90 and p99 of a latency, each None where it is of too few values; None where no request had it."""
        values = self.latencies[name]
        return _percentiles_ms(values, PERCENTILES) if values else None

    def document(self, window: Window) -> dict[str, Any]:
        """The figures as JSON values; a metric that cannot be computed is absent."""
        failed = self.sent - self.outcomes.get(OK, 0)
        counted = self.uncounted == 0
        return {
            "window_s": window.seconds, "sent": self.sent, "outcomes": dict(self.outcomes),
            "error_rate": failed / self.sent if self.sent else 0.0,
            "requests_per_s": self.completed / window.seconds if window.seconds > 0 else None,
            **({"output_tokens_per_s": self.tokens / window.seconds, "output_tokens": self.all_tokens}
               if counted and window.seconds > 0 else {}),
            "goodput_per_s": self.good / window.seconds if window.seconds > 0 else None,
            "goodput_share": self.good / self.in_window if self.in_window else None,
            "latency_ms": {name: found for name in METRICS if (found := self.percentiles_ms(name))},
            "ttft_p50_ms_by_tenth": [_percentiles_ms(part, (50,))["p50"] for part in self.ttft_parts],
        }  # fmt: skip


def _percentiles_ms(values: array[int], shares: Iterable[int]) -> dict[str, float | None]:
    ordered = np.sort(np.array(values, np.int64))
    return {f"p{share}": percentile(ordered, share) / 1e6 if enough(share, len(ordered)) else None for share in shares}


def meets(record: Record, slo: Slo) -> bool:
    """Whether a request was good: no error, and within every limit that there is. What cannot be computed is a miss."""
    if record.outcome != OK:
        return False
    timing = record.intended_timing
    pairs = ((slo.ttft_ms, timing.ttft_ns), (slo.e2e_ms, timing.e2e_ns))
    if any(limit is not None and (value is None or value > limit * 1e6) for limit, value in pairs):
        return False
    if slo.tpot_ms is None or timing.output_tokens == 1:  # one token has no time per further token
        return True
    tpot = timing.tpot_ns
    return tpot is not None and tpot <= slo.tpot_ms * 1e6


def summarize(records: Iterable[Record], window: Window, slo: Slo) -> Summary:
    """Add records up."""
    summary = Summary()
    for record in records:
        summary.add(record, window, slo)
    return summary
