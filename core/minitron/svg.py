"""Plots as SVG text: axes with round ticks, lines and points, a legend; nothing to load, nothing to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_FOR_LABELS = 1.1  # as much longer are axes whose points have words beside them
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 64, 16, 34, 46
# M. Okabe, K. Ito: colours that people with colour blindness can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Series:
    """Points to draw: joined by a line, or single where ``dots``; ``labels``: a word at each, and a dot."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False
    labels: Sequence[str] = ()


def plot(
    title: str, x_name: str, y_name: str, series: Sequence[Series], *, log_x: bool = False,
    marks: Sequence[tuple[float, str]] = (), y_from_zero: bool = True, x_from_zero: bool = False,
) -> str:  # fmt: skip
    """One plot; ``marks`` are vertical lines with a word each. Without any point, a plot that says so."""
    xs = [x for one in series for x in one.xs] + [x for x, _ in marks]
    ys = [y for one in series for y in one.ys]
    if not xs or not ys:
        return _frame(title, '<text x="280" y="170" text-anchor="middle">nothing was measured</text>')
    room = _FOR_LABELS if any(one.labels for one in series) else 1.0
    across = _Axis(0.0 if x_from_zero else min(xs), max(xs) * room, _LEFT, _WIDTH - _RIGHT, log=log_x)
    up = _Axis(0.0 if y_from_zero else min(ys), max(ys) * room, _HEIGHT - _BOTTOM, _TOP, log=False)
    parts = [_axes(across, up, x_name, y_name)]
    for number, one in enumerate(series):
        parts.append(_draw(one, across, up, _COLOURS[number % len(_COLOURS)]))
    parts += [_mark(across.place(x), word) for x, word in marks]
    return _frame(title, "".join(parts) + _legend(series))


@dataclass(frozen=True)
class Bar:
    """A row of ``intervals``: an estimate with what it is at least and at most, and a kind that has a colour."""

    name: str
    low: float
    value: float
    high: float
    kind: str


def intervals(title: str, x_name: str, bars: Sequence[Bar], marks: Sequence[tuple[float, str]] = ()) -> str:
    """Estimates below each other with their intervals, one colour a kind; ``marks`` as those of ``plot``."""
    if not bars:
        return _frame(title, '<text x="280" y="170" text-anchor="middle">nothing was measured</text>')
    xs = [x for bar in bars for x in (bar.low, bar.high)] + [x for x, _ in marks]
    spare = 0.05 * (max(xs) - min(xs))
    names = 7 * max(len(bar.name) for bar in bars) + 8
    left, bottom = min(_LEFT + names, _WIDTH // 2), _HEIGHT - _BOTTOM
    across = _Axis(min(xs) - spare, max(xs) + spare, left, _WIDTH - _RIGHT, log=False)
    kinds = list(dict.fromkeys(bar.kind for bar in bars))
    parts = [f'<path class="axis" d="M{left} {_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>']
    for value in across.ticks():
        parts.append(f'<text x="{across.place(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.6g}</text>')
    for number, bar in enumerate(bars):
        y, colour = _TOP + (bottom - _TOP) * (number + 0.5) / len(bars), _COLOURS[kinds.index(bar.kind) % len(_COLOURS)]
        low, value, high = (across.place(x) for x in (bar.low, bar.value, bar.high))
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>'
                     f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{colour}" stroke-width="2"/>'
                     f'<circle cx="{value:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')  # fmt: skip
    parts += [_mark(across.place(x), word) for x, word in marks]
    parts.append(
        f'<text x="{(left + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return _frame(title, "".join(parts) + _legend([Series(kind, [], []) for kind in kinds]))


def _mark(at: float, word: str) -> str:
    """A vertical line with a word."""
    return (f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text class="mark" x="{at + 4:.1f}" y="{_TOP + 12}">{escape(word)}</text>')  # fmt: skip


class _Axis:
    """Values to pixels, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self._log = log and low > 0
        if high <= low:
            high = low + (abs(low) or 1.0)
        self._low, self._high = (math.log10(low), math.log10(high)) if self._log else (low, high)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """The pixel of a value."""
        at = math.log10(max(value, 1e-12)) if self._log else value
        return self._start + (at - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten: all of them within a logarithmic axis, steps of one of them on any other."""
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [value for value in found if self._low <= math.log10(value) <= self._high]
        rough = (self._high - self._low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
        return [number * step for number in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]


def _axes(across: _Axis, up: _Axis, x_name: str, y_name: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
    for value in across.ticks():
        at = across.place(value)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:.6g}</text>')
    for value in up.ticks():
        at = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>')  # fmt: skip
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{escape(y_name)}'
                 "</text>")  # fmt: skip
    return "".join(parts)


def _draw(one: Series, across: _Axis, up: _Axis, colour: str) -> str:
    points = [(across.place(x), up.place(y)) for x, y in zip(one.xs, one.ys, strict=True)]
    if one.dots:
        return "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" fill-opacity="0.5"/>' for x, y in points
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    return line + "".join(_point(x, y, label, colour) for (x, y), label in zip(points, one.labels, strict=False))


def _point(x: float, y: float, label: str, colour: str) -> str:
    beside, anchor = (-6, "end") if x > _WIDTH * 0.8 else (6, "start")
    return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            f'<text x="{x + beside:.1f}" y="{y + 14:.1f}" text-anchor="{anchor}">{escape(label)}</text>')  # fmt: skip


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    parts, at = [], _LEFT + 8
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<rect x="{at}" y="{_TOP - 9}" width="9" height="9" fill="{colour}"/>'
                     f'<text x="{at + 13}" y="{_TOP - 1}">{escape(one.name)}</text>')  # fmt: skip
        at += 24 + 7 * len(one.name)
    return "".join(parts)


def _frame(title: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>{inside}</svg>'
    )
