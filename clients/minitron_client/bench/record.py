"""What is kept of one measured request, the latencies that follow from it, and the files that hold many.

The records of a run are lines of JSON, written as requests end; every figure of a run comes from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minitron import errors
from minitron_client.client.timing import Timing

OK = "ok"


@dataclass
class Record:
    """One request and its one outcome.

    ``responses``: for each response when it was received and how many generated tokens it carried (None: not said).
    ``outcome``: ``ok`` or the name of the error (``Rejected``, ``DeadlineExceeded``, …), whose line is in ``error``.
    ``input_tokens``: as counted by the server. All times are ns of one monotonic clock.
    """

    index: int
    intended_ns: int
    sent_ns: int = 0
    responses: list[tuple[int, int | None]] = field(default_factory=list)
    ended_ns: int = 0
    input_tokens: int | None = None
    max_tokens: int = 0
    outcome: str = ""
    error: str = ""

    @property
    def timing(self) -> Timing:
        """Its metrics from the moment at which it was really sent."""
        return Timing(self.sent_ns, self.responses)

    @property
    def intended_timing(self) -> Timing:
        """Its metrics from the moment at which the schedule wanted it sent, so that a late client hides nothing."""
        return Timing(self.intended_ns, self.responses)

    @property
    def lateness_ns(self) -> int:
        """Send lateness: actual send - intended send."""
        return self.sent_ns - self.intended_ns

    def failure(self) -> errors.ClientError:
        """The error that its outcome names."""
        kind = getattr(errors, self.outcome, errors.ClientError)
        return kind(self.error)

    def line(self) -> str:
        """The record as a line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Record:
        """Read a line back; raises ValueError, TypeError for anything else."""
        raw: dict[str, Any] = json.loads(line)
        raw["responses"] = [(time_ns, count) for time_ns, count in raw["responses"]]
        return cls(**raw)


@dataclass(frozen=True)
class Metric:
    """A latency: its ``label`` for people, and ``values`` of a record in whole ns, none where it cannot be computed.

    Of a request that failed only ``send_lateness`` counts.
    """

    label: str
    values: Callable[[Record], Sequence[int]]


def _whole(*values: float | None) -> list[int]:
    return [round(value) for value in values if value is not None]


#: Latencies of a request; "intended" counts from when the schedule wanted it sent. The formulas are Timing's.
METRICS: dict[str, Metric] = {
    "send_lateness": Metric("send lateness", lambda record: [record.lateness_ns]),
    "ttft_intended": Metric("TTFT, intended", lambda record: _whole(record.intended_timing.ttft_ns)),
    "ttft": Metric("TTFT", lambda record: _whole(record.timing.ttft_ns)),
    "itl": Metric("ITL", lambda record: _whole(*record.timing.itl_ns)),
    "tpot": Metric("TPOT", lambda record: _whole(record.timing.tpot_ns)),
    "e2e_intended": Metric("E2E, intended", lambda record: _whole(record.intended_timing.e2e_ns)),
    "e2e": Metric("E2E", lambda record: _whole(record.timing.e2e_ns)),
}


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL file; a last line that a crash cut off is left out. Raises InputError."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Record.of_line(line)
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith("\n"):
                    return
                raise errors.InputError(f"{path} line {number} is no record of a request ({error})") from error
