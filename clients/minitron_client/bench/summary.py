"""What many records add up to; summaries of several workers or slices merge into one without losing precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron_client.bench.histogram import Histogram
from minitron_client.bench.profile import Slo
from minitron_client.bench.record import OK, Record
from minitron_client.bench.statistics import PERCENTILES, enough

#: Latencies and their names for people; "intended" counts from when the schedule wanted the request sent.
METRICS = {
    "send_lateness": "send lateness", "ttft_intended": "TTFT, intended", "ttft": "TTFT", "itl": "ITL", "tpot": "TPOT",
    "e2e_intended": "E2E, intended", "e2e": "E2E",
}  # fmt: skip
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


@dataclass
class Summary:
    """Counts and histograms of the requests that were meant for the window, and what was completed inside it.

    ``sent`` and ``outcomes`` count every request of the run. ``in_window``, ``good`` (met the SLO) and ``latencies``
    those meant for the window; ``completed`` and ``tokens`` what was received inside it, whenever it was sent.
    ``ttft_parts``: TTFT in each tenth of the window.
    """

    sent: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    all_tokens: int = 0
    in_window: int = 0
    good: int = 0
    completed: int = 0
    tokens: int = 0
    uncounted: int = 0
    input_tokens: int = 0
    latencies: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in METRICS})
    ttft_parts: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in range(_PARTS)])

    def add(self, record: Record, window: Window, slo: Slo) -> None:
        """Count one record."""
        self.sent += 1
        self.outcomes[record.outcome] = self.outcomes.get(record.outcome, 0) + 1
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
        self.latencies["send_lateness"].record([record.lateness_ns])
        if record.outcome != OK:
            return
        actual, intended = record.timing, record.intended_timing
        values: dict[str, list[float]] = {
            "ttft": _some(actual.ttft_ns), "ttft_intended": _some(intended.ttft_ns), "itl": actual.itl_ns,
            "tpot": _some(actual.tpot_ns), "e2e": _some(actual.e2e_ns), "e2e_intended": _some(intended.e2e_ns),
        }  # fmt: skip
        for name, found in values.items():
            if found:
                self.latencies[name].record(found)
        if values["ttft"]:
            self.ttft_parts[window.part(record.intended_ns)].record(values["ttft"])

    def merge(self, other: Summary) -> None:
        """Add what ``other`` counted."""
        for name in ("sent", "all_tokens", "in_window", "good", "completed", "tokens", "uncounted", "input_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        for name, histogram in other.latencies.items():
            self.latencies[name].merge(histogram)
        for mine, theirs in zip(self.ttft_parts, other.ttft_parts, strict=True):
            mine.merge(theirs)

    def percentiles_ms(self, name: str) -> dict[str, float | None] | None:
        """p50, p90 and p99 of a latency, each None where it is of too few values; None where no request had it."""
        histogram = self.latencies[name]
        return {f"p{share}": _ms(histogram, share) for share in PERCENTILES} if histogram.count else None

    def document(self, window: Window) -> dict[str, Any]:
        """The figures as JSON values; a metric that cannot be computed is absent."""
        failed = self.sent - self.outcomes.get(OK, 0)
        counted = self.uncounted == 0
        return {
            "window_s": window.seconds, "sent": self.sent, "outcomes": self.outcomes,
            "error_rate": failed / self.sent if self.sent else 0.0,
            "requests_per_s": self.completed / window.seconds if window.seconds > 0 else None,
            **({"output_tokens_per_s": self.tokens / window.seconds, "output_tokens": self.all_tokens}
               if counted and window.seconds > 0 else {}),
            "goodput_per_s": self.good / window.seconds if window.seconds > 0 else None,
            "goodput_share": self.good / self.in_window if self.in_window else None,
            "latency_ms": {name: found for name in METRICS if (found := self.percentiles_ms(name))},
            "ttft_p50_ms_by_tenth": [_ms(part, 50) for part in self.ttft_parts],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Everything, as JSON values, for ``of_state`` in another process."""
        return vars(self) | {
            "latencies": {name: one.document() for name, one in self.latencies.items()},
            "ttft_parts": [one.document() for one in self.ttft_parts],
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Summary:
        """Read ``state`` back."""
        latencies = {name: Histogram.of_document(one) for name, one in state["latencies"].items()}
        parts = [Histogram.of_document(one) for one in state["ttft_parts"]]
        return cls(**state | {"latencies": latencies, "ttft_parts": parts})


def _some(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _ms(histogram: Histogram, share: int) -> float | None:
    value = histogram.percentile(share) if enough(share, histogram.count) else None
    return None if value is None else value / 1e6


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


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL file; a last line that a crash cut off is left out. Raises InputError."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Record.of_line(line)
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith("\n"):
                    return
                raise InputError(f"{path} line {number} is no record of a request ({error})") from error


def summarize(records: Iterable[Record], window: Window, slo: Slo) -> Summary:
    """Add records up."""
    summary = Summary()
    for record in records:
        summary.add(record, window, slo)
    return summary
