"""A grid of points (input tokens, output tokens, concurrency), each a small closed-loop load that is repeated.

Every answer has exactly the output length of its point (min_tokens = max_tokens, end token ignored), every prompt the
input length, as the server counts it. The figures of a repeat are taken from its first send to its last response.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minitron.errors import UsageError
from minitron_client.bench.loops import closed_loop
from minitron_client.bench.profile import Arrival, Length, Profile, Slo
from minitron_client.bench.record import OK, Record
from minitron_client.bench.requests import SyntheticPrompts, make_requests
from minitron_client.bench.schedule import plan
from minitron_client.bench.sender import SerializedRequest, sender_to
from minitron_client.bench.statistics import Estimate, mean, percentiles
from minitron_client.bench.summary import Window, summarize
from minitron_client.bench.watch import GoneWatch
from minitron_client.client.dialect import ServedModel
from minitron_client.client.openai import AnyEndpoint

SCHEMA = 1
DEFAULT_GRID = ("32:32:1", "32:32:4")
_METRICS = ("ttft", "itl", "tpot", "e2e")
_ALWAYS = Window(0, 2**63 - 1)


@dataclass(frozen=True)
class BenchPoint:
    """One point of the grid: tokens in, tokens out, requests at once."""

    input_tokens: int
    output_tokens: int
    concurrency: int

    @classmethod
    def parse(cls, text: str) -> BenchPoint:
        """Read ``INPUT:OUTPUT:CONCURRENCY``; raises UsageError."""
        try:
            point = cls(*map(int, text.split(":")))
        except (ValueError, TypeError):
            raise UsageError(
                f"{text!r} is no point of a grid; write INPUT:OUTPUT:CONCURRENCY, such as 32:64:4"
            ) from None
        if min(point.input_tokens, point.output_tokens, point.concurrency) < 1:
            raise UsageError(f"{text!r}: every number of a point must be at least 1")
        return point

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.input_tokens}:{self.output_tokens}:{self.concurrency}"

    def load(self, requests: int) -> Profile:
        """The point as a load of so many requests."""
        return Profile(
            arrival=Arrival(kind="closed", concurrency=self.concurrency, requests=requests), warm_up_s=0,
            input_tokens=Length(mean=self.input_tokens), output_tokens=Length(mean=self.output_tokens),
        )  # fmt: skip


@dataclass(frozen=True)
class BenchPointResult:
    """What was measured at a point: per metric its percentiles in ms, tokens/s over all streams, and failures by kind.

    A metric that the server's answers do not allow (it counted no tokens) is absent; a percentile of too few values is
    None.
    """

    point: BenchPoint
    requests: int
    failures: dict[str, int]
    input_tokens: tuple[int, int] | None
    metrics: dict[str, dict[int, Estimate | None]]
    counts: dict[str, int]
    tokens_per_s: Estimate | None

    def document(self) -> dict[str, Any]:
        """JSON values."""
        raw = asdict(self)
        raw["metrics"] = {
            name: {f"p{share}": one for share, one in shares.items()} | {"count": self.counts[name]}
            for name, shares in raw["metrics"].items()
        }
        del raw["counts"]
        return raw


@dataclass(frozen=True)
class Repetitions:
    """How much to measure: ``repeats`` of each point, of ``rounds`` requests per stream, after ``warm_up`` requests."""

    repeats: int = 3
    rounds: int = 2
    warm_up: int = 1
    deadline_s: float | None = None

    def requests(self, point: BenchPoint) -> int:
        """Requests of a point, the warm-up's among them."""
        return self.warm_up + self.repeats * point.concurrency * self.rounds


async def measure(
    endpoint: AnyEndpoint, model: ServedModel, points: Sequence[BenchPoint], *, prompts: SyntheticPrompts,
    repetitions: Repetitions, progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[BenchPointResult], dict[str, Any] | None]:  # fmt: skip
    """Measure every point in turn, until the server is gone: the results so far, and when that was (None: it is there).

    Raises the error of a warm-up request that failed (nothing else would work).
    """
    sender = sender_to(endpoint)
    watch, start_ns = GoneWatch(sender), time.monotonic_ns()
    results: list[BenchPointResult] = []
    sent = 0

    async def send(requests: Sequence[SerializedRequest], concurrency: int) -> list[Record]:
        nonlocal sent
        records = await closed_loop(sender, requests, concurrency, repetitions.deadline_s, watch, first=sent)
        sent += len(records)
        return records

    try:
        for number, point in enumerate(points, 1):
            requests = await asyncio.to_thread(_requests, model, point, prompts, repetitions)
            _check(await send(requests[: repetitions.warm_up], 1), watch)
            measured = requests[repetitions.warm_up :]
            size = point.concurrency * repetitions.rounds
            repeats: list[list[Record]] = []
            while len(repeats) < repetitions.repeats and not watch.sure:
                progress(f"point {number} of {len(points)}, repeat {len(repeats) + 1} of {repetitions.repeats}")
                repeats.append(await send(measured[len(repeats) * size :][:size], point.concurrency))
            if repeats:
                results.append(_result(point, repeats))
            if watch.sure:
                break
        return results, watch.suspected.document(start_ns) if watch.suspected else None
    finally:
        await sender.close()


def _requests(
    model: ServedModel, point: BenchPoint, prompts: SyntheticPrompts, repetitions: Repetitions
) -> list[SerializedRequest]:
    """All requests of a point as bytes, each with a prompt of its own so that no cache answers for the engine."""
    load = point.load(repetitions.requests(point))
    made = make_requests(plan(load), load, model, prompts, id_prefix=f"{uuid.uuid4().hex}-")
    return [request for _, _, request in made]


def _check(warm_up: Sequence[Record], watch: GoneWatch) -> None:
    for record in warm_up:
        if record.outcome != OK and not watch.sure:
            raise record.failure()


def _result(point: BenchPoint, repeats: Sequence[Sequence[Record]]) -> BenchPointResult:
    summaries = [summarize(records, _ALWAYS, Slo()) for records in repeats]
    outcomes = sum((one.outcomes for one in summaries), Counter[str]())
    succeeded = [[record for record in records if record.outcome == OK] for records in repeats]
    seen = [record.input_tokens for records in succeeded for record in records if record.input_tokens is not None]
    values = {f"{name}_ms": [np.array(one.latencies[name]) / 1e6 for one in summaries] for name in _METRICS}
    return BenchPointResult(
        point, sum(outcomes.values()), {kind: count for kind, count in outcomes.items() if kind != OK},
        (min(seen), max(seen)) if seen else None,
        {name: found for name, groups in values.items() if (found := percentiles(groups))},
        {name: sum(map(len, groups)) for name, groups in values.items()},
        mean([rate for records in succeeded if (rate := tokens_per_s(records)) is not None]),
    )  # fmt: skip


def tokens_per_s(records: Sequence[Record]) -> float | None:
    """Generated tokens of all records / (last response - first send); None where they were not counted."""
    if not records or any(record.timing.output_tokens is None for record in records):
        return None
    start = min(record.sent_ns for record in records)
    end = max(record.responses[-1][0] for record in records)
    return sum(record.timing.output_tokens or 0 for record in records) / (end - start) * 1e9
