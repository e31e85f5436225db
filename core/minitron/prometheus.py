"""What a server counted itself: its Prometheus page, read before, during and after a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron import web
from minitron.errors import NotReady

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Metrics:
    """Samples of one reading: (name, labels, value)."""

    samples: tuple[tuple[str, dict[str, str], float], ...]

    @classmethod
    def read(cls, url: str, timeout_s: float = 5.0) -> Metrics:
        """Read ``http://url/metrics``; raises NotReady."""
        page = web.read(url, "/metrics", "the server's metrics", "check --metrics-url", timeout_s)
        try:
            return cls.parse(page.decode())
        except ValueError as error:
            raise NotReady(f"{url}: what answers there are no metrics ({error}); check --metrics-url") from error

    @classmethod
    def parse(cls, text: str) -> Metrics:
        """Read Prometheus' text format."""
        found = (_LINE.match(line) for line in text.splitlines() if not line.startswith("#"))
        return cls(tuple(
            (one["name"], dict(_LABEL.findall(one["labels"] or "")), float(one["value"])) for one in found if one
        ))  # fmt: skip

    def sum(self, name: str, **labels: str) -> float | None:
        """Sum of the samples of a name with these labels; None where there is none."""
        values = [value for found, has, value in self.samples if found == name and labels.items() <= has.items()]
        return sum(values) if values else None

    def gained(self, before: Metrics, name: str, **labels: str) -> float | None:
        """What a counter gained since ``before``; None where the server has no such counter."""
        now = self.sum(name, **labels)
        return None if now is None else now - (before.sum(name, **labels) or 0.0)
