"""A server that lives with leaving clients: the small Minitron under streams half of which are left in the middle.

Eight streams for half of the time, then 64, straight at ``tensorrt_llm`` and through the text model, over gRPC and
HTTP; who leaves does so at a random moment, by deadline, cancel or closed connection (``leaving_clients``). Then:

* the server is the one that was started: same processes, no restart, no word of a signal in its log;
* every other answer is whole, the greedy one known beforehand, and what those got who left is its beginning;
* private memory and open files of tritonserver and of each model's process are flat: the second quarter of a phase
  beside the last (the first is warm-up), and the files of the idle server after it beside those before;
* the engine is idle one second after the last client, and nothing waits in Triton;
* asked to end under streams, the server ends within three seconds of the last one, exit code 0, and leaves nothing.

    python benches/soak.py --minutes 30 --json soak.json
    python benches/soak.py --minutes 2 --models tensorrt_llm --ways deadline cancel      # a half of it, to find a fault
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bars import Bar, exit_code
from leaving_clients import Clients, Habits, Known
from minitron_serve import minitron_serve
from server_watch import Footprint, Growth, Watched, end_of, growths
from small_repository import SMALL_MODEL, small_repository

from minitron import console

_STREAMS = (8, 64)
_PROMPTS = 24
_TOKENS = range(64, 401, 16)
_CACHE_TOKENS = 8_000  # what 16 sequences fill, so that a cache that fills is not taken for a leak
_STEP_S = 2.0
_SILENCE_S = 30.0  # streams are open and nothing comes: it hangs
_IDLE_AFTER_S, _END_WITHIN_S = 1.0, 3.0
#: What still counts as flat, for each process: caches of allocators settle late.
_MEMORY_GROWTH, _MEMORY_SLACK_BYTES, _FILES_SLACK = 0.03, 8 << 20, 8


def main() -> int:
    """Soak, print the verdicts, write JSON."""
    args = _arguments()
    with _work(args.work) as work:
        repository = args.repository or small_repository(
            work, "--bls-max-concurrency", str(max(args.streams)), "--max-tokens-in-paged-kv-cache", str(_CACHE_TOKENS)
        )
        with minitron_serve(repository, work) as (process, document):
            soak = Soak(args, Watched(document), document["urls"], _questions(repository, args.seed))
            report = asyncio.run(soak.run(process))
        if soak.server.log.exists():  # it did not end in good order
            args.log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(soak.server.log, args.log)
            print(f"the server's log: {args.log}", file=sys.stderr)
    print(console.table([bar.row() for bar in soak.bars], ["", "measured", "must be", "verdict", "conditions"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return exit_code(soak.bars)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="of load, an equal part for each number of streams (default 30)")
    add("--streams", type=int, nargs="+", default=_STREAMS, help="at once, one number after the other (default 8 64)")
    add("--models", nargs="+", choices=Habits.models, default=Habits.models, help="who is asked (default: both)")
    add("--share", type=float, default=Habits.share, help="of the clients that leave (default %(default)s)")
    add("--short", type=float, nargs=2, default=Habits.short_s, metavar="S",
        help="seconds between which half of those leave (default 0.1 0.4)")  # fmt: skip
    add("--ways", nargs="+", choices=Habits.ways, default=Habits.ways, metavar="WAY",
        help=f"how clients leave, and over what: {', '.join(Habits.ways)} (default: all)")  # fmt: skip
    add("--most-requests", type=int, default=500_000, metavar="N", help="end a number of streams early after so many")
    add("--seed", type=int, default=1, help="of all that is random about the clients (default 1)")
    add("--repository", type=Path, help="of the small Minitron, instead of a new one")
    add("--work", type=Path, help="folder to work in, kept (default: a temporary one)")
    add("--log", type=Path, default=Path("out", "soak-server.log"), metavar="FILE",
        help="where the log of a server goes that does not end in good order (default %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write figures and verdicts as one JSON document")
    return parser.parse_args()


@contextmanager
def _work(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="minitron-soak-") as made:
            yield Path(made)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _questions(repository: Path, seed: int) -> list[Known]:
    """Beginnings of texts of different lengths, each with its number of tokens to generate."""
    import random

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(repository / "tokenizer" / "tokenizer.json"))
    chapters = json.loads((SMALL_MODEL.parents[1] / "tests/data/small_minitron/held_out.json").read_text("utf-8"))
    chance = random.Random(seed)
    words = [word for chapter in chapters for word in str(chapter).split()]
    questions = []
    for _ in range(_PROMPTS):
        begin = chance.randrange(len(words) - 40)
        prompt = " ".join(words[begin : begin + chance.randint(3, 40)])
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        questions.append(Known(prompt, tuple(ids), chance.choice(_TOKENS)))
    return questions


class Soak:
    """One server's soak; ``bars`` are its verdicts."""

    def __init__(
        self, args: argparse.Namespace, server: Watched, urls: dict[str, str], questions: Sequence[Known]
    ) -> None:
        self._args, self.server, self._urls, self._questions = args, server, urls, questions
        self._habits = Habits(args.models, args.ways, args.share, tuple(args.short))
        self.bars: list[Bar] = []
        self._trouble: str | None = None

    async def run(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """All phases and the end; the report."""
        await self._clients().learn()
        idle = self.server.footprints()
        print(f"{len(self._questions)} answers known; {self._processes(idle)}", flush=True)
        phases = []
        for streams in self._args.streams:
            if self._trouble is None:
                phases.append(await self._phase(streams, idle))
        end = None
        if self._trouble is None:
            end = await self._end(process)
        self._bar("crashes and hangs", 0 if self._trouble is None else 1, 0, self._trouble or "same processes")
        return {
            "schema": 1, "seed": self._args.seed, "minutes": self._args.minutes, "habits": vars(self._habits),
            "trouble": self._trouble, "phases": phases, "end": end,
            "bars": [{**vars(bar), "met": bar.met} for bar in self.bars], "ok": exit_code(self.bars) == 0,
        }  # fmt: skip

    def _clients(self) -> Clients:
        return Clients(self._urls, self._questions, self._habits, self._args.seed)

    async def _phase(self, streams: int, idle: dict[str, Footprint]) -> dict[str, Any]:
        clients, samples = self._clients(), []
        began = time.perf_counter()
        until = began + self._args.minutes * 60 / len(self._args.streams)

        def is_over() -> bool:
            return (
                time.perf_counter() > until
                or self._trouble is not None
                or clients.tally.requests >= self._args.most_requests
            )

        running = asyncio.ensure_future(clients.run(streams, is_over))
        said = 0.0
        while not running.done():
            await asyncio.wait([running], timeout=_STEP_S)
            now = time.perf_counter()
            self._trouble = self._trouble or self.server.crash() or self._silence(clients, now)
            if self._trouble:
                running.cancel()
                await asyncio.wait([running])
                break
            if now < until:
                samples.append(self.server.footprints())
            if now > said + 30 or running.done():
                said = now
                print(f"{streams} streams, {now - began:.0f} s: {_progress(clients)}", flush=True)
        if not running.cancelled():
            running.result()
        self._judge_answers(f"{streams} streams", clients)
        found = {"streams": streams, "seconds": round(time.perf_counter() - began, 1), **clients.tally.document()}
        if self._trouble or not samples:
            return found
        await asyncio.sleep(_IDLE_AFTER_S)
        grown = growths(samples)
        self._judge_rest(streams, self.server.requests(), grown, idle)
        return found | {"processes": [one.document() for one in grown]}

    def _silence(self, clients: Clients, now: float) -> str | None:
        silent_s = now - clients.tally.response
        if not clients.open or silent_s < _SILENCE_S:
            return None
        return f"no response for {silent_s:.0f} s, and {len(clients.open)} streams are open: it hangs"

    def _judge_answers(self, when: str, clients: Clients) -> None:
        tally = clients.tally
        for text in tally.wrong[:5]:
            print(f"  wrong: {text}", flush=True)
        said = f"of {tally.whole} whole ones and {sum(tally.left.values())} that were left"
        self._bar(f"{when}: wrong answers", len(tally.wrong), 0, said)

    def _judge_rest(
        self, streams: int, requests: tuple[float, float], grown: list[Growth], idle: dict[str, Footprint]
    ) -> None:
        self._bar(f"{streams} streams: requests in the engine, 1 s later", requests[0], 0, "as it counts them")
        self._bar(f"{streams} streams: requests that wait in Triton", requests[1], 0, "1 s later")
        for one in grown:
            said = f"{_mib(one.early.private_bytes)} to {_mib(one.late.private_bytes)}"
            most = _MEMORY_GROWTH * one.early.private_bytes + _MEMORY_SLACK_BYTES
            self._bar(f"{streams} streams: {one.name} grew, MiB", one.private_bytes / 2**20, most / 2**20, said)
        worst = max(grown, key=lambda one: one.files)
        said = f"{worst.name}, {worst.early.files} to {worst.late.files}"
        self._bar(f"{streams} streams: most files more", worst.files, _FILES_SLACK, said)
        now = self.server.footprints()
        kept = {name: now[name].files - before.files for name, before in idle.items()}
        name = max(kept, key=lambda one: kept[one])
        said = f"{name}, idle before with {idle[name].files}"
        self._bar(f"{streams} streams: most files kept", kept[name], _FILES_SLACK, said)

    async def _end(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Ask the server to end while eight streams run, some of which leave."""
        clients, ended = self._clients(), False
        running = asyncio.ensure_future(clients.run(8, lambda: ended))
        await asyncio.sleep(1)
        ended = True
        process.send_signal(signal.SIGTERM)
        await running
        last_stream = time.perf_counter()
        end = await asyncio.to_thread(end_of, self.server, process, last_stream)
        self._judge_answers("end", clients)
        said = "after the last of 8 streams"
        self._bar("end: seconds", end.seconds, _END_WITHIN_S, said)
        self._bar("end: exit code", end.exit_code, 0, said)
        self._bar("end: traces", len(end.left), 0, ", ".join(end.left) or "processes, shared memory, folder")
        return end.document()

    def _bar(self, name: str, measured: float, limit: float, conditions: str) -> None:
        self.bars.append(Bar(name, measured, limit, conditions))
        if not self.bars[-1].met:
            print(f"  MISSED: {name}: {measured:g}, must be at most {limit:g} ({conditions})", flush=True)

    def _processes(self, found: dict[str, Footprint]) -> str:
        return ", ".join(f"{name} {_mib(one.private_bytes)} {one.files} files" for name, one in found.items())


def _progress(clients: Clients) -> str:
    tally = clients.tally
    left = ", ".join(f"{count} by {way}" for way, count in sorted(tally.left.items()))
    return (
        f"{tally.requests} requests, {tally.whole} whole, left {left} ({tally.middle} in the middle), "
        f"{tally.responses} responses, {len(tally.wrong)} wrong"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
