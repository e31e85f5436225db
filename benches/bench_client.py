"""What the load generator itself adds: its clock against a known schedule, its rate, its pacing, and its honesty.

The other side is ``scheduled_server.py``, a bare process that stamps every response with the time at which it sent it.

* timing error: received minus stamped send, of first tokens (TTFT) and of the gaps between tokens (ITL). A run in which
  the server's own lateness (sent minus due) has a p99 above 1 ms says nothing and is dropped; fewer than five kept runs
  are no verdict, and the exit code says so. At 256 streams the interval is the shortest at which the server keeps that.
* requests/s on a model that answers at once, beside a hand-written raw grpc.aio loop, in alternating runs.
* send lateness at 300 requests/s.
* a server stopped for one second (SIGSTOP) in a run of 100 requests/s must show as a p99 of at least 0.9 s.
* the rate that was sent, beside the server's own count.

    python benches/bench_client.py                    # everything, some minutes
    python benches/bench_client.py --only timing-64   # one part
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from minitron_trtllm import output
from minitron_trtllm.client.dialect import ServedModel
from minitron_trtllm.client.endpoint import INFER_RPC, Endpoint
from minitron_trtllm.client.request import Request
from minitron_trtllm.client.tensors import unpack
from minitron_trtllm.load import profile as profiles
from minitron_trtllm.load import run as runs
from minitron_trtllm.load import schedule
from minitron_trtllm.load.latency import closed_loop
from minitron_trtllm.load.record import OK, Record
from minitron_trtllm.load.statistics import percentile
from minitron_trtllm.load.wire import Prepared, Wire, prepare

_INPUTS = {"text_input": "BYTES", "max_tokens": "INT32", "return_num_output_tokens": "BOOL", "stream": "BOOL"}
_WANTED_RUNS, _MOST_RUNS = 5, 12
_SERVER_LATENESS_MS = 1.0
_INTERVALS_256 = (25, 40, 60, 80, 100)


def main() -> int:
    """Run the parts, print a table, write JSON; 0 if every bar was met, 1 if not, 2 without a verdict."""
    args = _arguments()
    parts: dict[str, Callable[[], list[Bar]]] = {
        "timing-64": lambda: _timing(64, (10,), args.seconds, (1.5, 3.0, 0.15, 1.5)),
        "timing-256": lambda: _timing(256, _INTERVALS_256, args.seconds, (None, 10.0, None, 5.0)),
        "null": _null,
        "pacing": _pacing,
        "stall": _stall,
    }
    bars = [bar for name, part in parts.items() if args.only in (None, name) for bar in part()]
    print(output.table([bar.row() for bar in bars], ["figure", "measured", "bar", "verdict", "conditions"]))
    if args.output:
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("grpcio", "tritonclient", "protobuf")}
        document = {"machine": machine, "versions": versions, "bars": [vars(bar) | {"met": bar.met} for bar in bars]}
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    if any(bar.met is None for bar in bars):
        return 2
    return 0 if all(bar.met for bar in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("timing-64", "timing-256", "null", "pacing", "stall"))
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a timing run (default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


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


# ---- the other side


@dataclass
class Server:
    """A running scheduled server."""

    process: subprocess.Popen[str]
    endpoint: Endpoint
    counts: Path

    def counted(self) -> dict[str, int]:
        """What it has counted, up to a second ago."""
        time.sleep(1.2)
        return json.loads(self.counts.read_text())  # type: ignore[no-any-return]


@contextlib.contextmanager
def _server(interval_ms: int) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.json")
        script = Path(__file__).with_name("scheduled_server.py")
        words = [sys.executable, str(script), "--interval-ms", str(interval_ms), "--counts", str(counts)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        try:
            yield Server(process, Endpoint(f"127.0.0.1:{int(process.stdout.readline())}"), counts)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _request(model: str, tokens: int) -> Prepared:
    served = ServedModel(model, "bls", decoupled=True, batched=True, inputs=_INPUTS)
    return prepare(served, Request("x", max_tokens=tokens), "bench")


# ---- timing error


class _StampedWire(Wire):
    """The measuring client, keeping each response so that its stamps can be read after the run."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.kept: dict[int, list[Any]] = {}

    def _take(self, response: Any, record: Record, received_ns: int) -> bool:
        self.kept.setdefault(id(record), []).append(response)
        return super()._take(response, record, received_ns)


@dataclass
class _TimingRun:
    """Of one run, in ms: errors of first tokens and gaps, the server's lateness; and its share of the possible rate."""

    ttft: list[float]
    itl: list[float]
    lateness_p99: float
    rate_share: float


async def _timing_run(server: Server, streams: int, interval_ms: int, seconds: float) -> _TimingRun:
    wire = _StampedWire(server.endpoint)
    tokens = max(round(seconds * 1e3 / interval_ms), 2)
    try:
        await closed_loop(wire, [_request("null", 1)] * streams, streams)  # opens the connection
        wire.kept.clear()
        records = await closed_loop(wire, [_request("scheduled", tokens)] * streams, streams)
    finally:
        await wire.close()
    ttft, itl, late = [], [], []
    for record in records:
        assert record.outcome == OK, record.error
        stamps = [_stamps(response) for response in wire.kept[id(record)]]
        received = [time_ns for time_ns, _ in record.responses]
        late += [(sent - due) / 1e6 for due, sent in stamps]
        ttft.append((received[0] - stamps[0][1]) / 1e6)
        itl += [
            abs((now - before) - (sent - sent_before)) / 1e6
            for (before, now), ((_, sent_before), (_, sent)) in zip(pairwise(received), pairwise(stamps), strict=True)
        ]
    lengths = [(record.responses[-1][0] - record.responses[0][0]) / 1e6 for record in records]
    return _TimingRun(ttft, itl, percentile(late, 99), (tokens - 1) * interval_ms / statistics.mean(lengths))


def _stamps(response: Any) -> tuple[int, int]:
    infer = response.infer_response
    raw = {tensor.name: raw for tensor, raw in zip(infer.outputs, infer.raw_output_contents, strict=True)}
    return unpack("INT64", raw["due_ns"])[0], unpack("INT64", raw["sent_ns"])[0]


def _timing(streams: int, intervals_ms: tuple[int, ...], seconds: float, limits: tuple[float | None, ...]) -> list[Bar]:
    """Bars at the shortest interval that the server keeps in at least five runs."""
    kept: list[_TimingRun] = []
    for interval in intervals_ms:
        with _server(interval) as server:
            made = []
            for attempt in range(_MOST_RUNS):
                made.append(asyncio.run(_timing_run(server, streams, interval, seconds)))
                kept = [run for run in made if run.lateness_p99 <= _SERVER_LATENESS_MS]
                if len(kept) == _WANTED_RUNS or len(kept) + _MOST_RUNS - attempt - 1 < _WANTED_RUNS:
                    break
        if len(kept) == _WANTED_RUNS:
            break
    said = f"{streams} streams, a token every {interval:g} ms, {len(kept)} of {len(made)} runs kept"
    if len(kept) < _WANTED_RUNS:
        worst = statistics.median(run.lateness_p99 for run in made)
        return [Bar(f"timing error at {streams}", None, None, f"{said}; server lateness p99 {worst:.2f} ms (median)")]
    ttft = [value for run in kept for value in run.ttft]
    itl = [value for run in kept for value in run.itl]
    figures = [("TTFT", 50, ttft), ("TTFT", 99, ttft), ("ITL", 50, itl), ("ITL", 99, itl)]
    bars = [
        Bar(f"{name} error p{share} ms", percentile(values, share), limit, said)
        for (name, share, values), limit in zip(figures, limits, strict=True)
    ]
    return [*bars, Bar("share of the possible rate", min(run.rate_share for run in kept), 0.995, said, at_least=True)]


# ---- requests/s, pacing, stall


def _null(seconds: float = 3.0, rounds: int = 5, streams: int = 64) -> list[Bar]:
    with _server(1) as server:
        ratios = []
        for _ in range(rounds):
            raw = asyncio.run(_raw_rate(server.endpoint.url, streams, seconds))
            ratios.append(asyncio.run(_our_rate(server.endpoint, streams, seconds)) / raw)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    said = f"{streams} streams, {rounds} alternating rounds of {seconds:g} s, ratios {spread}"
    return [Bar("requests/s over raw grpc.aio", statistics.median(ratios), 0.9, said, at_least=True)]


async def _our_rate(endpoint: Endpoint, streams: int, seconds: float) -> float:
    wire, done, prepared = Wire(endpoint), 0, _request("null", 1)
    end = time.monotonic() + seconds

    async def stream() -> None:
        nonlocal done
        while time.monotonic() < end:
            record = await wire.send(prepared, Record(done, time.monotonic_ns()))
            assert record.outcome == OK, record.error
            done += 1

    await asyncio.gather(*(stream() for _ in range(streams)))
    await wire.close()
    return done / seconds


async def _raw_rate(url: str, streams: int, seconds: float) -> float:
    """The least that anyone can do: bytes out, a parsed message in, until the stream ends."""
    channel = grpc.aio.insecure_channel(url)
    infer = channel.unary_stream(INFER_RPC, None, pb.ModelStreamInferResponse.FromString)
    message, done = _request("null", 1).message, 0
    end = time.monotonic() + seconds

    async def stream() -> None:
        nonlocal done
        while time.monotonic() < end:
            async for _ in infer(message):
                pass
            done += 1

    await asyncio.gather(*(stream() for _ in range(streams)))
    await channel.close()
    return done / seconds


def _load(server: Server, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """A constant-rate run by the load generator's own machinery."""
    settings = {"arrival.kind": "constant", "arrival.rate": rate, "duration_s": seconds, "warm_up_s": 1.0}
    profile = profiles.load(None, list(settings.items()))
    message = _request("null", 1).message
    requests = [(one.index, one.at_ns, message, 1) for one in schedule.plan(profile)]
    return runs.execute(profile, requests, server.endpoint, folder, model="null")


def _pacing() -> list[Bar]:
    with _server(1) as server, tempfile.TemporaryDirectory() as folder:
        summary = _load(server, 300, 12, Path(folder))["summary"]
        counted = server.counted()
    ours = summary["requests_per_s"]
    theirs = (counted["requests"] - 1) / ((counted["last_ns"] - counted["first_ns"]) / 1e9)
    said = "300 requests/s for 12 s, one worker"
    return [
        Bar("send lateness p99 ms", summary["latency_ms"]["send_lateness"]["p99"], 0.5, said),
        Bar("requests not counted alike", abs(summary["sent"] - counted["requests"]) / counted["requests"], 0.01, said),
        Bar("rate against the server's", abs(ours / theirs - 1), 0.01, said),
    ]


def _stall() -> list[Bar]:
    with _server(1) as server, tempfile.TemporaryDirectory() as folder:
        pid = server.process.pid
        for delay, what in ((4.0, signal.SIGSTOP), (5.0, signal.SIGCONT)):
            threading.Timer(delay, os.kill, (pid, what)).start()
        document = _load(server, 100, 8, Path(folder))
    found = document["summary"]["latency_ms"]["ttft_intended"]["p99"] / 1e3
    said = "100 requests/s for 8 s, the server stopped for 1 s"
    return [
        Bar("p99 from intended send, s", found, 0.9, said, at_least=True),
        Bar("stalls marked", float(len(document["stalls"])), 1, said, at_least=True),
    ]


if __name__ == "__main__":
    sys.exit(main())
