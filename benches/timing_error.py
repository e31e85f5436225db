"""How wrong the load generator's clock is: received minus stamped send, against a server with a known schedule.

A run in which the server's own lateness (sent minus due) has a p99 above 1 ms says nothing of the client and is
discarded; fewer than five kept runs are no verdict.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from bars import Bar
from sender import sender
from timetable import Schedule

from minitron_client.bench.loops import closed_loop
from minitron_client.bench.record import OK, Record
from minitron_client.bench.sender import GrpcSender, SerializedRequest, serialize
from minitron_client.bench.statistics import percentile
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import Endpoint
from minitron_client.client.request import Request
from minitron_client.client.tensors import unpack

_INPUTS = {"text_input": "BYTES", "max_tokens": "INT32", "return_num_output_tokens": "BOOL", "stream": "BOOL"}
_TOKENS = 20  # of each request, so that a run holds many first tokens
_WANTED_RUNS, _MOST_RUNS = 5, 12
_SERVER_LATENESS_MS = 1.0


class Limits(NamedTuple):
    """Bars in ms (None: none) of the errors' percentiles."""

    ttft_p50: float | None
    ttft_p99: float
    itl_p50: float | None
    itl_p99: float


AT_64 = Limits(1.5, 3.0, 0.15, 1.5)
AT_256 = Limits(None, 10.0, None, 5.0)


@dataclass
class Run:
    """Of one run, in ms: errors of first tokens and gaps, the server's lateness; and its share of the possible rate."""

    ttft: list[float]
    itl: list[float]
    late: list[float]
    rate_share: float

    @property
    def kept(self) -> bool:
        """Whether the server was punctual enough for the run to say something of the client."""
        return percentile(self.late, 99) <= _SERVER_LATENESS_MS


def request(model: str, tokens: int, prompt: str = "x") -> SerializedRequest:
    """A request to a server with a known schedule."""
    served = ServedModel(model, "bls", decoupled=True, batched=True, inputs=_INPUTS)
    return serialize(served, Request(prompt, max_tokens=tokens), "bench")


class _StampedWire(GrpcSender):
    """The measuring client, keeping the times that each response carries in its last output."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.stamps: dict[int, list[bytes]] = {}

    def _take(self, response: Any, record: Record, received_ns: int) -> bool:
        self.stamps.setdefault(record.index, []).append(response.infer_response.raw_output_contents[-1])
        return super()._take(response, record, received_ns)


async def measure(endpoint: Endpoint, streams: int, interval_ms: float, seconds: float) -> Run:
    """One run: so many streams, each with one request after the other, which begin and end spread over the time.

    The first request of each stream is ramp: the first stream's is the shortest, and none of them counts.
    """
    wire = _StampedWire(endpoint)
    rounds = max(round(seconds * 1e3 / (_TOKENS * interval_ms)), 2)
    prompts = [one.prompt() for one in Schedule.spread(round(interval_ms * 1e6), streams)]
    ramp = [request("scheduled", 1 + _TOKENS * number // streams, prompt) for number, prompt in enumerate(prompts)]
    counted = [request("scheduled", _TOKENS, prompt) for prompt in prompts]
    try:
        records = await closed_loop(wire, ramp + counted * rounds, streams)
    finally:
        await wire.close()
    return errors(records[streams:], wire.stamps, interval_ms)


def errors(records: Sequence[Record], stamps: Mapping[int, Sequence[bytes]], interval_ms: float) -> Run:
    """What a run shows; ``stamps``: of each response of a record (by its index) the two INT64 due and sent, in ns."""
    ttft, itl, late = [], [], []
    for record in records:
        assert record.outcome == OK, record.error
        times = [unpack("INT64", raw) for raw in stamps[record.index]]
        received = [time_ns for time_ns, _ in record.responses]
        late += [(sent - due) / 1e6 for due, sent in times]
        ttft.append((received[0] - times[0][1]) / 1e6)
        itl += [
            abs((now - before) - (sent - sent_before)) / 1e6
            for (before, now), ((_, sent_before), (_, sent)) in zip(pairwise(received), pairwise(times), strict=True)
        ]
    gaps = [len(record.responses) - 1 for record in records]
    lengths = [(record.responses[-1][0] - record.responses[0][0]) / 1e6 for record in records]
    return Run(ttft, itl, late, interval_ms * sum(gaps) / sum(lengths))


def runs(endpoint: Endpoint, streams: int, interval_ms: float, seconds: float) -> list[Run]:
    """Runs until enough of them are kept."""
    with sender() as call:
        return until_enough(lambda: call(_run, endpoint, streams, interval_ms, seconds))


def _run(endpoint: Endpoint, streams: int, interval_ms: float, seconds: float) -> Run:
    return asyncio.run(measure(endpoint, streams, interval_ms, seconds))


def until_enough(measured: Callable[[], Run]) -> list[Run]:
    """Runs until enough of them are kept, or until that can no longer be."""
    made: list[Run] = []
    while not enough(made) and _kept(made) + _MOST_RUNS - len(made) >= _WANTED_RUNS:
        made.append(measured())
    return made


def enough(made: Sequence[Run]) -> bool:
    """Whether so many runs are kept that there is a verdict."""
    return _kept(made) >= _WANTED_RUNS


def _kept(made: Sequence[Run]) -> int:
    return sum(run.kept for run in made)


def judge(name: str, schedule: str, made: Sequence[Run], limits: Limits) -> list[Bar]:
    """Bars over the values of all kept runs together; one without a verdict where there are too few."""
    kept = [run for run in made if run.kept]
    late = percentile([value for run in kept or made for value in run.late], 99)
    said = f"{schedule}, {len(kept)} of {len(made)} runs kept, server late p99 {late:.2f} ms"
    if not enough(made):
        return [Bar(f"{name}: timing error", None, None, said)]
    ttft = [value for run in kept for value in run.ttft]
    itl = [value for run in kept for value in run.itl]
    figures = [("TTFT", 50, ttft), ("TTFT", 99, ttft), ("ITL", 50, itl), ("ITL", 99, itl)]
    bars = [
        Bar(f"{name}: {metric} error p{share} ms", percentile(values, share), limit, said)
        for (metric, share, values), limit in zip(figures, limits, strict=True)
    ]
    share = min(run.rate_share for run in kept)
    return [*bars, Bar(f"{name}: share of the possible rate", share, 0.995, said, at_least=True)]
