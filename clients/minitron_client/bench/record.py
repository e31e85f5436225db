"""What is kept of one measured request: when it should have gone out, when it did, what came, and how it ended."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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
