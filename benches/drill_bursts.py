"""Streams that are asked together, straight at ``tensorrt_llm``: none may be held back from the others.

Triton's scheduler once held one in twenty for up to half a second, where a queue policy made it look for requests only
now and then. A stream is held when its first token comes a quarter of a second after the first one of its burst: what
slows the machine slows all of a burst.

    python benches/drill_bursts.py --bursts 60 --json bursts.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import grpc
from bars import Bar, exit_code
from leaving_clients import TOKENS, Known, answer
from minitron_serve import minitron_serve
from small_repository import small_repository

from minitron import console

_HELD_S = 0.25
_TOKENS = 16


def main() -> int:
    """Ask in bursts, print latencies and the verdict, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bursts", type=int, default=60, help="how many, one after the other (default 60)")
    parser.add_argument("--streams", type=int, default=4, help="in each (default 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and verdict as one JSON document")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-bursts-") as made:
        repository = small_repository(Path(made))
        with minitron_serve(repository, Path(made)) as (_, document):
            bursts = asyncio.run(_bursts(document["urls"]["grpc"], args.bursts, args.streams))
    late = [after - min(burst) for burst in bursts for after in burst]
    bars = [Bar("streams held", sum(one >= _HELD_S for one in late), 0, f"{_HELD_S:g} s behind the first of a burst")]
    firsts = [after for burst in bursts for after in burst]
    print(
        f"first token of {len(firsts)} streams: median {statistics.median(firsts) * 1e3:.1f} ms, "
        f"latest {max(firsts) * 1e3:.1f} ms; behind the first of its burst: latest {max(late) * 1e3:.1f} ms"
    )
    print(console.table([bar.row() for bar in bars], ["", "measured", "must be", "verdict", "conditions"]))
    if args.json:
        report = {"schema": 1, "first_token_s": bursts, "bars": [{**vars(bar), "met": bar.met} for bar in bars]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return exit_code(bars)


async def _bursts(url: str, bursts: int, streams: int) -> list[list[float]]:
    """Seconds to the first token of each stream of each burst."""
    async with grpc.aio.insecure_channel(url) as channel:

        async def first(number: int) -> float:
            began, came = time.perf_counter(), 0.0
            async for _ in answer(channel, TOKENS, Known("", (5 + number, 6, 7), _TOKENS)):
                came = came or time.perf_counter() - began
            return came

        await first(0)  # opens the connection
        return [list(await asyncio.gather(*map(first, range(streams)))) for _ in range(bursts)]


if __name__ == "__main__":
    sys.exit(main())
