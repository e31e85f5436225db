"""What the load generator itself adds: its clock against a known schedule, its rate, its pacing, and its honesty.

* timing error: received minus stamped send, of first tokens (TTFT) and of the gaps between tokens (ITL), of streams
  spread evenly over the interval. Against ``scheduled_server.py``, a bare process, it is the client's own with a socket
  in between. Against ``scheduled_model`` in the real Triton it holds Triton's way from the Python backend through its
  core and gRPC, too. Taken at the shortest of several intervals that the server keeps. A run in which the
  server's own lateness (sent minus due) has a p99 above 1 ms says nothing and is discarded; fewer than five kept runs
  are no verdict, and the exit code says so.
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
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import known_servers
import psutil
import timing_error
from bars import Bar, exit_code
from sender import sender
from timing_error import AT_64, AT_256, Limits
from tritonclient.grpc import service_pb2 as pb

from minitron import console
from minitron.text.channel import INFER_RPC
from minitron_client.bench import profile as profiles
from minitron_client.bench import run as runs
from minitron_client.bench import schedule
from minitron_client.bench.process import scheduling
from minitron_client.bench.record import OK, Record
from minitron_client.bench.sender import GrpcSender
from minitron_client.client.endpoint import Endpoint


class Schedules(NamedTuple):
    """So many streams, on the shortest of the intervals that the server keeps, and the bars for them."""

    streams: int
    intervals_ms: Sequence[int]
    limits: Limits


_PARTS: dict[str, Callable[[float], list[Bar]]] = {
    "timing-64": lambda seconds: _bare_timing(Schedules(64, (10,), AT_64), seconds),
    "timing-256": lambda seconds: _bare_timing(Schedules(256, (25, 30, 40, 60, 80, 100), AT_256), seconds),
    "triton-64": lambda seconds: _triton_timing(Schedules(64, (25, 50, 100), AT_64), seconds),
    "triton-256": lambda seconds: _triton_timing(Schedules(256, (100, 200, 400), AT_256), seconds),
    "null": lambda _: _null(),
    "pacing": lambda _: _pacing(),
    "stall": lambda _: _stall(),
}


def main() -> int:
    """Run the parts, print a table, write JSON; 0 if every bar was met, 1 if not, 2 without a verdict."""
    args = _arguments()
    bars = [bar for name in args.only or _PARTS for bar in _measured(_PARTS[name], args.seconds)]
    print(console.table([bar.row() for bar in bars], ["figure", "measured", "bar", "verdict", "conditions"]))
    if args.output:
        args.output.write_text(json.dumps(_document(bars), indent=1) + "\n")
    return exit_code(bars)


def _measured(part: Callable[[float], list[Bar]], seconds: float) -> list[Bar]:
    """The bars of a part, and in their conditions how much of the machine something else used meanwhile."""
    began, busy, own = time.monotonic(), _busy_s(), _own_s()
    bars = part(seconds)
    others = (_busy_s() - busy - (_own_s() - own)) / (os.cpu_count() or 1) / (time.monotonic() - began)
    return [replace(bar, conditions=f"{bar.conditions}; others used {max(others, 0):.0%} of the CPU") for bar in bars]


def _busy_s() -> float:
    """CPU time that the whole machine has used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)  # user holds guest


def _own_s() -> float:
    """CPU time of this process and of all children that have ended."""
    return sum(os.times()[:4])


def _document(bars: list[Bar]) -> dict[str, Any]:
    packages = ("grpcio", "tritonclient", "protobuf", "nvidia-pytriton")
    return {
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "scheduling": scheduling(),
        },
        "versions": {name: version(name) for name in packages},
        "bars": [vars(bar) | {"met": bar.met} for bar in bars],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=_PARTS, metavar="PART", help=f"of {', '.join(_PARTS)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a timing run (default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


# ---- timing error


def _bare_timing(wanted: Schedules, seconds: float) -> list[Bar]:
    with known_servers.bare() as server:
        return _timing("", server.endpoint, wanted, seconds)


def _triton_timing(wanted: Schedules, seconds: float) -> list[Bar]:
    with known_servers.triton() as server:
        return _timing("Triton, ", server.endpoint, wanted, seconds)


def _timing(of: str, endpoint: Endpoint, wanted: Schedules, seconds: float) -> list[Bar]:
    """At the first of the intervals that the server keeps in five runs (the last, if it keeps none)."""
    for interval in wanted.intervals_ms:
        made = timing_error.runs(endpoint, wanted.streams, interval, seconds)
        if timing_error.enough(made):
            break
    name = f"{of}{wanted.streams} streams"
    return timing_error.judge(name, f"a token every {interval} ms", made, wanted.limits)


# ---- requests/s, pacing, stall


def _null(seconds: float = 3.0, rounds: int = 5, streams: int = 64) -> list[Bar]:
    with known_servers.bare() as server, sender() as call:
        ratios = []
        for _ in range(rounds):
            raw = call(_raw_rate, server.endpoint.url, streams, seconds)
            ratios.append(call(_our_rate, server.endpoint, streams, seconds) / raw)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    said = f"{streams} streams, {rounds} alternating rounds of {seconds:g} s, ratios {spread}"
    return [Bar("requests/s over raw grpc.aio", statistics.median(ratios), 0.9, said, at_least=True)]


def _our_rate(endpoint: Endpoint, streams: int, seconds: float) -> float:
    prepared = timing_error.request("null", 1)

    async def one(wire: GrpcSender) -> None:
        record = await wire.send(prepared, Record(0, time.monotonic_ns()))
        assert record.outcome == OK, record.error

    async def main() -> float:
        wire = GrpcSender(endpoint)
        try:
            return await _rate(lambda: one(wire), streams, seconds)
        finally:
            await wire.close()

    return asyncio.run(main())


def _raw_rate(url: str, streams: int, seconds: float) -> float:
    """The least that anyone can do: bytes out, a parsed message in, until the stream ends."""
    message = timing_error.request("null", 1).message

    async def one(infer: Any) -> None:
        async for _ in infer(message):
            pass

    async def main() -> float:
        async with grpc.aio.insecure_channel(url) as channel:
            infer = channel.unary_stream(INFER_RPC, None, pb.ModelStreamInferResponse.FromString)
            return await _rate(lambda: one(infer), streams, seconds)

    return asyncio.run(main())


async def _rate(ask: Callable[[], Awaitable[None]], streams: int, seconds: float) -> float:
    """Requests/s of so many streams, each with one request after the other."""
    done, end = 0, time.monotonic() + seconds

    async def stream() -> None:
        nonlocal done
        while time.monotonic() < end:
            await ask()
            done += 1

    await asyncio.gather(*(stream() for _ in range(streams)))
    return done / seconds


def _load(server: known_servers.Bare, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """A constant-rate run by the load generator's own machinery."""
    settings = {"arrival.kind": "constant", "arrival.rate": rate, "duration_s": seconds, "warm_up_s": 1.0}
    profile = profiles.load(None, list(settings.items()))
    prepared = timing_error.request("null", 1)
    requests = [(one.index, one.at_ns, prepared) for one in schedule.plan(profile)]
    return runs.execute(profile, requests, server.endpoint, folder, model="null")


def _pacing() -> list[Bar]:
    with known_servers.bare() as server, tempfile.TemporaryDirectory() as folder:
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
    with known_servers.bare() as server, tempfile.TemporaryDirectory() as folder:
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
