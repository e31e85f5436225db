"""Ends of a server: each in good order, soon after the last stream, and with nothing left.

Every other server is idle when it is asked to end; the others have 64 streams, some of which are left in the middle,
and then all of them at once.

    python benches/drill_ends.py --ends 30 --json ends.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bars import Bar, exit_code
from leaving_clients import Clients, Habits, Known
from minitron_serve import minitron_serve
from server_watch import End, Watched, end_of
from small_repository import small_repository

from minitron import console

_STREAMS = 64
_LOAD_S = 4.0
_WITHIN_S = 3.0


def main() -> int:
    """Start and end servers, print the verdicts, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--ends", type=int, default=30, help="how many servers (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="of what the clients do (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and verdicts as one JSON document")
    args = parser.parse_args()
    ends: dict[str, list[End]] = {"idle": [], "loaded": []}
    with tempfile.TemporaryDirectory(prefix="minitron-ends-") as made:
        work = Path(made)
        repository = small_repository(work, "--bls-max-concurrency", str(_STREAMS))
        for number in range(args.ends):
            kind = "loaded" if number % 2 else "idle"
            with minitron_serve(repository, work) as (process, document):
                server = Watched(document)
                if kind == "loaded":
                    asyncio.run(_load(document["urls"], args.seed + number))
                last_stream = time.perf_counter()
                process.send_signal(signal.SIGTERM)
                ends[kind].append(end_of(server, process, last_stream))
            print(f"{number + 1}: {kind}, {json.dumps(ends[kind][-1].document())}", flush=True)
            if server.log.exists():
                print(f"  {(work / 'server.log').read_text(encoding='utf-8').strip().splitlines()[-1]}", flush=True)
    bars = [bar for kind, found in ends.items() if found for bar in _bars(kind, found)]
    print(console.table([bar.row() for bar in bars], ["", "measured", "must be", "verdict", "conditions"]))
    if args.json:
        document = {kind: [end.document() for end in found] for kind, found in ends.items()}
        report = {"schema": 1, "ends": document, "bars": [{**vars(bar), "met": bar.met} for bar in bars]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return exit_code(bars)


async def _load(urls: dict[str, str], seed: int) -> None:
    """A saturated server for some seconds; then every client leaves at once, in the middle of its answer."""
    chance = random.Random(seed)
    known = [Known("In the beginning", tuple(chance.choices(range(5, 900), k=8)), 400) for _ in range(16)]  # no answers
    clients = Clients(urls, known, Habits(), seed)
    running = asyncio.ensure_future(clients.run(_STREAMS, lambda: False))
    await asyncio.sleep(_LOAD_S)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


def _bars(kind: str, ends: list[End]) -> list[Bar]:
    seconds = [end.seconds for end in ends]
    left = [trace for end in ends for trace in end.left]
    return [
        Bar(f"{kind}: slowest, s", max(seconds), _WITHIN_S, f"of {len(ends)}, median {statistics.median(seconds):.2f}"),
        Bar(f"{kind}: exit codes other than 0", sum(end.exit_code != 0 for end in ends), 0, f"of {len(ends)}"),
        Bar(f"{kind}: traces", len(left), 0, ", ".join(left[:3]) or "processes, shared memory, folders"),
    ]


if __name__ == "__main__":
    sys.exit(main())
