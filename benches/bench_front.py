"""What the ways from text to tokens cost: ``tensorrt_llm`` itself, the text model, the gateway, two of its workers.

One Triton with an engine that costs next to nothing (``stepping_model``: a token every 5 ms for each stream), 64
streams of 200 tokens at once through each way, in interleaved rounds; every ratio is of one round, the figure their
median. CPU is that of the servers (Triton's processes and the gateway's). The time to the first token is the client's,
of as many streams that start evenly over four seconds: of those at once, all but the first would wait for each other.

    python benches/bench_front.py --json out.json
    python benches/bench_front.py --base GIT_REF          # and against the text model of another commit
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import source_tree
from bars import Bar, exit_code
from minitron_serve import minitron_serve

from minitron import console

HERE = Path(__file__).parent
STREAMS, TOKENS = 64, 200
SPREAD_S = 4


@dataclass
class Way:
    """How the tokens are asked for, at which address, and by which processes' CPU time they are paid."""

    client: str
    address: str
    pids: tuple[int, ...]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def run(self, streams: int, tokens: int) -> None:
        """One round."""
        before = self._cpu_s()
        told = self._ask(streams, tokens, 0)
        made = streams * tokens
        self.rounds.append({
            "tokens_per_s": made / told["seconds"],
            "cpu_us_per_token": (self._cpu_s() - before) / made * 1e6,
            "client_cpu_us_per_token": told["cpu_s"] / made * 1e6,
            "ttft_ms": [one * 1e3 for one in self._ask(streams, tokens, SPREAD_S)["ttft_s"]],
        })  # fmt: skip

    def _ask(self, streams: int, tokens: int, spread_s: float) -> Any:
        words = [self.client, self.address, streams, tokens, spread_s]
        argv = [sys.executable, str(HERE / "front_client.py"), *map(str, words)]
        return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300).stdout)

    def _cpu_s(self) -> float:
        trees = [psutil.Process(pid) for pid in self.pids]
        every = {process for tree in trees for process in (tree, *tree.children(recursive=True))}
        return float(sum(sum(process.cpu_times()[:2]) for process in every))

    def median(self, name: str) -> float:
        """Of the rounds."""
        return float(statistics.median(one[name] for one in self.rounds))

    def ttft_ms(self, share: float) -> float:
        """Time to the first token that this share of all streams kept."""
        every = sorted(value for one in self.rounds for value in one["ttft_ms"])
        return float(every[min(int(share * len(every)), len(every) - 1)])


def main() -> int:
    """Measure, print a table, write JSON; 0 if every bar was met."""
    args = _arguments()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-front-")))
        ways = _ways(work, args.base, stack)
        for way in ways.values():
            way.run(8, 20)  # first requests load code
            way.rounds.clear()
        for number in range(args.rounds):
            for name in sorted(ways, reverse=bool(number % 2)):
                ways[name].run(STREAMS, TOKENS)
                print(f"round {number + 1}, {name}: {ways[name].rounds[-1]['tokens_per_s']:,.0f} tokens/s",
                      file=sys.stderr)  # fmt: skip
    bars = _bars(ways)
    print(_table(ways))
    print(console.table([bar.row() for bar in bars], ["figure", "measured", "bar", "verdict", "conditions"]))
    if args.json:
        args.json.write_text(json.dumps(_document(ways, bars), indent=1) + "\n", encoding="utf-8")
    return exit_code(bars)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of all ways (default %(default)s)")
    parser.add_argument("--base", metavar="REF", help="measure the text model of this commit too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def _ways(work: Path, base: str | None, stack: contextlib.ExitStack) -> dict[str, Way]:
    pid, grpc = stack.enter_context(_server(source_tree.ROOT, work))
    ways = {"direct": Way("tensorrt_llm", grpc, (pid,)), "text_model": Way("tensorrt_llm_bls", grpc, (pid,))}
    for name, workers in (("gateway", 1), ("gateway_2_workers", 2)):
        own, address = stack.enter_context(_gateway(grpc, workers))
        ways[name] = Way("http", address, (pid, own))
    if base:
        tree = source_tree.checked_out(base, work / "base-tree")
        (work / "base").mkdir()
        base_pid, base_grpc = stack.enter_context(_server(tree, work / "base"))
        ways["base"] = Way("tensorrt_llm_bls", base_grpc, (base_pid,))
    return ways


@contextlib.contextmanager
def _server(tree: Path, work: Path) -> Iterator[tuple[int, str]]:
    """Triton on the small Minitron's repository, rendered by that tree, with the stepping engine in its place."""
    stages = (
        ("convert", tree / "models" / "small-minitron", "--output", work / "checkpoint"),
        ("build", work / "checkpoint", "--target", "cpu", "--output", work / "engine"),
        ("render", work / "engine", "--output", work / "repository", "--bls-max-concurrency", str(STREAMS)),
    )
    for words in stages:
        source_tree.run(tree, *words)
    version = work / "repository" / "tensorrt_llm" / "1"
    shutil.rmtree(version)
    version.mkdir()
    (version / "model.py").write_bytes((HERE / "stepping_model" / "model.py").read_bytes())
    with minitron_serve(work / "repository", work, tree) as (process, state):
        yield process.pid, state["urls"]["grpc"]


@contextlib.contextmanager
def _gateway(grpc: str, workers: int) -> Iterator[tuple[int, str]]:
    words = ("gateway", "--listen", "127.0.0.1:0", "--upstream", grpc, "--workers", str(workers), "--json")
    with source_tree.running(source_tree.ROOT, *words) as process:
        yield process.pid, source_tree.document(process)["url"].split("//")[1].removesuffix("/v1")


def _ratio(ways: dict[str, Way], one: str, other: str) -> float | None:
    """Median over the rounds of the ratio of tokens/s within a round."""
    if other not in ways:
        return None
    pairs = zip(ways[one].rounds, ways[other].rounds, strict=True)
    return float(statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs))


def _bars(ways: dict[str, Way]) -> list[Bar]:
    """The figures and what they must be."""
    at = f"{STREAMS} streams x {TOKENS} tokens, {len(ways['direct'].rounds)} rounds"
    added = {share: ways["gateway"].ttft_ms(share) - ways["direct"].ttft_ms(share) for share in (0.5, 0.99)}
    bars = [
        Bar("text_model_to_direct", _ratio(ways, "text_model", "direct"), 0.6, at, at_least=True),
        Bar("gateway_to_direct", _ratio(ways, "gateway", "direct"), 1.0, at, at_least=True),
        Bar("gateway_2_workers_to_direct", _ratio(ways, "gateway_2_workers", "direct"), None, at),
        Bar("gateway_added_ttft_p50_ms", added[0.5], 5, f"{at}, one every {SPREAD_S / STREAMS * 1e3:.0f} ms"),
        Bar("gateway_added_ttft_p99_ms", added[0.99], 30, "the same"),
    ]
    if "base" in ways:
        bars.append(Bar("text_model_to_base", _ratio(ways, "text_model", "base"), 1.5, at, at_least=True))
    return bars


def _table(ways: dict[str, Way]) -> str:
    head = ["way", "tokens/s", "server CPU us/token", "client CPU us/token", "TTFT p50 ms", "p99"]
    return console.table(
        [
            [name, f"{way.median('tokens_per_s'):,.0f}", f"{way.median('cpu_us_per_token'):,.0f}",
             f"{way.median('client_cpu_us_per_token'):,.0f}", f"{way.ttft_ms(0.5):.1f}", f"{way.ttft_ms(0.99):.1f}"]
            for name, way in ways.items()
        ],
        head,
    )  # fmt: skip


def _document(ways: dict[str, Way], bars: list[Bar]) -> dict[str, Any]:
    return {
        "schema": 1, "streams": STREAMS, "tokens": TOKENS, "cores": os.cpu_count(),
        # What core's data/gateway.yaml holds, for the plan.
        "triton_us_per_token": ways["direct"].median("cpu_us_per_token"),
        "gateway_us_per_token": ways["gateway"].median("cpu_us_per_token") - ways["direct"].median("cpu_us_per_token"),
        **{bar.name: bar.measured for bar in bars},
        "ways": {
            name: {"rounds": [{key: value for key, value in one.items() if key != "ttft_ms"} for one in way.rounds],
                   "ttft_p50_ms": way.ttft_ms(0.5), "ttft_p99_ms": way.ttft_ms(0.99)}
            for name, way in ways.items()
        },
        "bars": [vars(bar) | {"met": bar.met} for bar in bars],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
