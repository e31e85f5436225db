"""The schedule of a load: which requests, how long, and when, all drawn from the seed before anything is sent.

Arrival processes: constant; Poisson (exponential gaps); gamma (gaps of the same mean with shape ``burstiness``); ramp
(a Poisson process whose rate rises linearly, by inverting its cumulative rate); trace (times as recorded).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import InputError, UsageError
from minitron_client.bench.profile import Arrival, Length, Profile


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of the plan: when (ns after the start; None in a closed loop) and how many tokens in and out."""

    index: int
    at_ns: int | None
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class ScheduleSlice:
    """One of ``of`` disjoint shares of a plan, ``number`` counting from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> ScheduleSlice:
        """Read ``I/N``; raises UsageError."""
        try:
            made = cls(*map(int, text.split("/")))
        except (ValueError, TypeError):
            raise UsageError(f"--slice {text!r}: write I/N, such as 1/3") from None
        if not 1 <= made.number <= made.of:
            raise UsageError(f"--slice {text!r}: the first number must be from 1 to the second")
        return made

    def takes(self, index: int) -> bool:
        """Whether the request of this index belongs to it."""
        return index % self.of == self.number - 1

    def share(self, count: int) -> int:
        """Its part of ``count`` streams; the shares of all slices add up to ``count``."""
        return count // self.of + (self.number - 1 < count % self.of)


def plan(profile: Profile) -> list[ScheduledRequest]:
    """The whole plan; the same for the same profile, on every machine."""
    if profile.arrival.kind == "trace":
        assert profile.arrival.trace is not None
        return list(_trace(profile.arrival.trace, profile))
    times = _times(profile.arrival, profile.duration_s, np.random.default_rng([profile.seed, 1]))
    count = profile.arrival.requests if times is None else len(times)
    inputs = _lengths(profile.input_tokens, count, np.random.default_rng([profile.seed, 2]))
    outputs = _lengths(profile.output_tokens, count, np.random.default_rng([profile.seed, 3]))
    return [ScheduledRequest(i, None if times is None else times[i], inputs[i], outputs[i]) for i in range(count)]


def _times(arrival: Arrival, duration_s: float, draw: np.random.Generator) -> list[int] | None:
    if arrival.kind == "closed":
        return None
    if arrival.kind == "ramp":
        return _ramp(arrival, duration_s, draw)
    mean_gap = 1 / arrival.rate
    shape = {"constant": math.inf, "poisson": 1.0, "gamma": arrival.burstiness}[arrival.kind]
    times: list[int] = []
    at = 0.0
    while True:
        # multiplied, not added up, so that no rounding gathers over a long run
        at = (len(times) + 1) / arrival.rate if math.isinf(shape) else at + float(draw.gamma(shape, mean_gap / shape))
        if at >= duration_s:
            return times
        times.append(round(at * 1e9))


def _ramp(arrival: Arrival, duration_s: float, draw: np.random.Generator) -> list[int]:
    """Rate r(t) = a + b t; expected requests until t: a t + b t^2 / 2, inverted at unit-rate Poisson times."""
    start, slope = arrival.rate, (arrival.to_rate - arrival.rate) / duration_s
    times: list[int] = []
    expected = 0.0
    while True:
        expected += float(draw.exponential())
        if slope == 0:
            at = expected / start
        else:
            under = start**2 + 2 * slope * expected
            at = (math.sqrt(under) - start) / slope if under >= 0 else math.inf
        if at >= duration_s:
            return times
        times.append(round(at * 1e9))


def _lengths(length: Length, count: int, draw: np.random.Generator) -> list[int]:
    if length.kind == "fixed":
        values = np.full(count, length.mean)
    elif length.kind == "uniform":
        values = draw.integers(length.low, length.high, size=count, endpoint=True).astype(np.float64)
    elif length.kind == "normal":
        values = draw.normal(length.mean, length.deviation, count)
    else:  # mean and deviation are those of the lengths, not of their logarithms
        variance = math.log1p((length.deviation / length.mean) ** 2)
        values = draw.lognormal(math.log(length.mean) - variance / 2, math.sqrt(variance), count)
    return [int(value) for value in np.clip(np.rint(values), length.low, length.high)]


def _trace(path: Path, profile: Profile) -> Iterator[ScheduledRequest]:
    """Requests of a recorded trace that fall into the duration, times divided by ``speed``."""
    try:
        rows = list(_csv(path) if path.suffix == ".csv" else _jsonl(path))
    except OSError as error:
        raise InputError(f"trace {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"trace {path}: a row cannot be read ({error}); JSONL needs timestamp (ms), input_length and "
            "output_length, CSV needs TIMESTAMP, ContextTokens and GeneratedTokens"
        ) from error
    if not rows:
        raise InputError(f"trace {path} holds no request")
    first = min(at for at, _, _ in rows)
    for index, (at, tokens_in, tokens_out) in enumerate(sorted(rows)):
        offset_s = (at - first) / profile.arrival.speed
        if offset_s < profile.duration_s:
            yield ScheduledRequest(index, round(offset_s * 1e9), max(tokens_in, 1), max(tokens_out, 1))


def _jsonl(path: Path) -> Iterator[tuple[float, int, int]]:
    """Mooncake's trace: ``timestamp`` in ms."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row: dict[str, Any] = json.loads(line)
            yield row["timestamp"] / 1e3, int(row["input_length"]), int(row["output_length"])


def _csv(path: Path) -> Iterator[tuple[float, int, int]]:
    """Azure's LLM trace: ``TIMESTAMP`` as date and time, with seven decimals of a second."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            whole, _, decimals = row["TIMESTAMP"].partition(".")
            at = datetime.fromisoformat(whole).timestamp() + float(f"0.{decimals or 0}")
            yield at, int(row["ContextTokens"]), int(row["GeneratedTokens"])
