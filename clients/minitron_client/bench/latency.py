"""The latency test: a grid of (input tokens, output tokens, concurrency), each point repeated, closed loop.

Every answer has exactly the output length of its point (min_tokens = max_tokens, end token ignored), every prompt the
input length, as the server counts it. The figures of a repeat are taken from its first send to its last response.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minitron.errors import UsageError
from minitron_client.bench.gone import GoneWatch
from minitron_client.bench.pauses import no_pauses
from minitron_client.bench.prompts import PromptMaker
from minitron_client.bench.record import OK, Record
from minitron_client.bench.statistics import Estimate, mean, percentiles
from minitron_client.bench.wire import AnyWire, Prepared, prepare, wire_to
from minitron_client.client.dialect import ServedModel
from minitron_client.client.openai import AnyEndpoint
from minitron_client.client.request import Request

SCHEMA = 1
FIXED_LENGTH = "every answer has exactly its output length (min_tokens = max_tokens, end token ignored)"
_METRICS: dict[str, Callable[[Record], list[float]]] = {
    "ttft_ms": lambda record: _present(record.timing.ttft_ns),
    "itl_ms": lambda record: [value / 1e6 for value in record.timing.itl_ns],
    "tpot_ms": lambda record: _present(record.timing.tpot_ns),
    "e2e_ms": lambda record: _present(record.timing.e2e_ns),
}


def _present(ns: float | None) -> list[float]:
    return [] if ns is None else [ns / 1e6]


@dataclass(frozen=True)
class Point:
    """One point of the grid: tokens in, tokens out, requests at once."""

    input_tokens: int
    output_tokens: int
    concurrency: int

    @classmethod
    def parse(cls, text: str) -> Point:
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


@dataclass(frozen=True)
class PointResult:
    """What was measured at a point: per metric its percentiles in ms, tokens/s over all streams, and failures by kind.

    A metric that the server's answers do not allow (it counted no tokens) is absent; a percentile of too few values is
    None.
    """

    point: Point
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
class Effort:
    """How much to measure: ``repeats`` of each point, of ``rounds`` requests per stream, after ``warm_up`` requests."""

    repeats: int = 3
    rounds: int = 2
    warm_up: int = 1
    deadline_s: float | None = None


async def measure(
    endpoint: AnyEndpoint, model: ServedModel, points: Sequence[Point], *, prompts: PromptMaker, effort: Effort,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[PointResult], dict[str, Any] | None]:  # fmt: skip
    """Measure every point in turn, until the server is gone: the results so far, and when that was (None: it is there).

    Raises the error of a warm-up request that failed (nothing else would work).
    """
    wire = wire_to(endpoint)
    watch, start_ns = GoneWatch(wire), time.monotonic_ns()
    results: list[PointResult] = []
    sent = 0

    async def send(prepared: Sequence[Prepared], concurrency: int) -> list[Record]:
        nonlocal sent
        records = await closed_loop(wire, prepared, concurrency, effort.deadline_s, watch, first=sent)
        sent += len(records)
        return records

    try:
        for number, point in enumerate(points, 1):
            prepared = await asyncio.to_thread(_prepare_point, model, point, prompts, effort)
            _check(await send(prepared[: effort.warm_up], 1), watch)
            measured = prepared[effort.warm_up :]
            size = point.concurrency * effort.rounds
            repeats: list[list[Record]] = []
            while len(repeats) < effort.repeats and not watch.sure:
                progress(f"point {number} of {len(points)}, repeat {len(repeats) + 1} of {effort.repeats}")
                repeats.append(await send(measured[len(repeats) * size :][:size], point.concurrency))
            if repeats:
                results.append(_result(point, repeats))
            if watch.sure:
                break
        return results, watch.suspected.document(start_ns) if watch.suspected else None
    finally:
        await wire.close()


def _prepare_point(model: ServedModel, point: Point, prompts: PromptMaker, effort: Effort) -> list[Prepared]:
    """All requests of a point as bytes, each with a prompt of its own so that no cache answers for the engine."""
    length = point.output_tokens

    def one(index: int) -> Prepared:
        text = prompts.make(point.input_tokens, index)
        request = Request(text, max_tokens=length, min_tokens=length, ignore_end=True)
        return prepare(model, request, uuid.uuid4().hex)

    return [one(index) for index in range(effort.warm_up + effort.repeats * point.concurrency * effort.rounds)]


def _check(warm_up: Sequence[Record], watch: GoneWatch) -> None:
    for record in warm_up:
        if record.outcome != OK and not watch.sure:
            raise record.failure()


async def closed_loop(
    wire: AnyWire, prepared: Sequence[Prepared], concurrency: int, deadline_s: float | None = None,
    watch: GoneWatch | None = None, *, first: int = 0,
) -> list[Record]:  # fmt: skip
    """Send all requests, ``concurrency`` at a time, each as soon as another has ended; their records in order.

    No more is sent once ``watch`` has found the server gone. ``first``: index of the first request.
    """
    waiting = iter(enumerate(prepared, first))
    records: list[Record] = []
    watch = watch or GoneWatch(wire)

    async def stream() -> None:
        while not watch.sure and (following := next(waiting, None)):
            index, one = following
            record = Record(index, intended_ns=time.monotonic_ns())
            records.append(record)
            await wire.send(one, record, deadline_s)
            await watch.look_after(record)

    with no_pauses():
        await asyncio.gather(*(stream() for _ in range(concurrency)))
    return sorted(records, key=lambda record: record.index)


def _result(point: Point, repeats: Sequence[Sequence[Record]]) -> PointResult:
    good = [[record for record in records if record.outcome == OK] for records in repeats]
    everything = [record for records in repeats for record in records]
    failures: dict[str, int] = {}
    for record in everything:
        if record.outcome != OK:
            failures[record.outcome] = failures.get(record.outcome, 0) + 1
    values = {
        name: [[value for record in records for value in read(record)] for records in good]
        for name, read in _METRICS.items()
    }
    seen = [record.input_tokens for records in good for record in records if record.input_tokens is not None]
    return PointResult(
        point, len(everything), failures, (min(seen), max(seen)) if seen else None,
        {name: found for name, groups in values.items() if (found := percentiles(groups))},
        {name: sum(map(len, groups)) for name, groups in values.items()},
        mean([rate for records in good if (rate := tokens_per_s(records)) is not None]),
    )  # fmt: skip


def tokens_per_s(records: Sequence[Record]) -> float | None:
    """Generated tokens of all records / (last response - first send); None where they were not counted."""
    if not records or any(record.timing.output_tokens is None for record in records):
        return None
    start = min(record.sent_ns for record in records)
    end = max(record.responses[-1][0] for record in records)
    return sum(record.timing.output_tokens or 0 for record in records) / (end - start) * 1e9
