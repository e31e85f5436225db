"""The first hour before it is paid for: what each step takes, by data/hour.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from minitron import console, data_files
from minitron.checks import of_step


@dataclass(frozen=True)
class HourStep:
    """A step's name, its least and most minutes, where they come from, and the checks that it makes."""

    name: str
    least: float
    most: float
    source: str

    @property
    def lines(self) -> int:
        """How many checks it makes."""
        return len(of_step(self.name))


def steps() -> list[HourStep]:
    """In the order of an acceptance."""
    return [
        HourStep(name, float(entry["minutes"][0]), float(entry["minutes"][1]), entry["from"])
        for name, entry in _data()["steps"].items()
    ]


def default_price() -> float:
    """US dollars an hour, an assumption."""
    return float(_data()["price_per_hour_usd"])


def table(price: float) -> str:
    """Steps with their time and money, each with the sum so far, so that one sees where a FAIL ends the hour."""
    rows, spent = list(_rows(price)), sum(step.most for step in steps())
    head = ("step", "lines", "minutes", "at most, so far", "USD at most, so far", "from")
    least = sum(step.least for step in steps())
    total = f"{least:.0f} to {spent:.0f} minutes, {least / 60 * price:.2f} to {spent / 60 * price:.2f} USD"
    return f"{console.table(rows, head)}\n\nTogether {total} at {price:.2f} USD an hour (an assumption: --price)."


def _rows(price: float) -> Iterator[tuple[str, ...]]:
    so_far = 0.0
    for step in steps():
        so_far += step.most
        minutes = f"{step.least:g} to {step.most:g}" if step.least != step.most else f"{step.most:g}"
        yield step.name, str(step.lines), minutes, f"{so_far:.1f}", f"{so_far / 60 * price:.2f}", step.source


@cache
def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = data_files.load("hour.yaml")
    return loaded
