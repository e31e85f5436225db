"""Measured figures beside what they must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Bar:
    """A figure and what it must be: at most ``limit``, or at least where ``at_least``. None measured: no verdict."""

    name: str
    measured: float | None
    limit: float | None
    conditions: str
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar was met; None where nothing could be said."""
        if self.measured is None:
            return None
        if self.limit is None:
            return True
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> list[str]:
        """For the table."""
        measured = "-" if self.measured is None else f"{self.measured:.3f}"
        limit = "-" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return [
            self.name,
            measured,
            limit,
            {True: "met", False: "MISSED", None: "no verdict"}[self.met],
            self.conditions,
        ]


def exit_code(bars: list[Bar]) -> int:
    """0 if every bar was met, 1 if one was missed, 2 if nothing could be said of one."""
    if any(bar.met is None for bar in bars):
        return 2
    return 0 if all(bar.met for bar in bars) else 1
