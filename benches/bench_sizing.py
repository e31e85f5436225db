"""The simulation behind ``minitron plan --traffic`` beside the CPU engine that it simulates.

The engine is asked in this process, without a server. How long its steps take is measured first (closed batches and
single prompts, fitted to a + b x sequences + c x prompt tokens + d x context tokens), and again after each run, since
other work on the machine changes it; the simulation gets the mean of both. Then the same schedule, Poisson arrivals at
30, 60 and 90 % of the measured capacity, goes through engine and simulation.

    python benches/bench_sizing.py --json out/sizing.json
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tests", "models")]

import numpy as np  # noqa: E402

from minitron_build.checkpoint.convert import convert  # noqa: E402
from minitron_build.engines.openvino import write as cpu  # noqa: E402
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine  # noqa: E402
from minitron_triton.models.tensorrt_llm.generation import Chunk  # noqa: E402
from minitron_triton.models.tensorrt_llm.generation_request import Request  # noqa: E402
from minitron_build.plan.limits import Limits  # noqa: E402
from minitron_build.plan.simulation import Arrival, Outcome, Step, simulate  # noqa: E402
from minitron_build.plan.traffic import Traffic  # noqa: E402
from minitron.model.shape import ModelShape  # noqa: E402
from random_model import write_random_model  # noqa: E402

SHAPE = ModelShape(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_layers=6, num_heads=8, num_kv_heads=2,
    max_positions=1024, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False,
    dtype="bfloat16",
)  # fmt: skip
LIMITS = Limits(max_batch_size=4, max_input_len=512, max_seq_len=768, max_num_tokens=256)
TRAFFIC = {
    "input_tokens": {"kind": "lognormal", "mean": 96, "deviation": 64, "low": 8, "high": 256},
    "output_tokens": {"kind": "lognormal", "mean": 48, "deviation": 32, "low": 4, "high": 128},
}
SHARES = (0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: ``fixed`` and for each sequence, token of a prompt, and token of context."""

    fixed: float
    sequence: float
    prompt: float
    context: float

    def __call__(self, step: Step) -> float:
        parts = (self.sequence, step.sequences), (self.prompt, step.prompt_tokens), (self.context, step.context_tokens)
        return self.fixed + sum(cost * count for cost, count in parts)

    def between(self, other: Costs) -> Costs:
        return Costs(*((a + b) / 2 for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Bench:
    """One engine, asked directly."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._random = engine, np.random.default_rng(seed)

    def _request(self, prompt: int, output: int) -> Request:
        ids = [int(one) for one in self._random.integers(4, SHAPE.vocab_size, prompt)]  # no two share a beginning
        return Request(ids, output, end_ids=frozenset())

    def play(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Send each request at its time, whatever became of those before; times as the schedule's."""
        requests = [self._request(one.prompt, one.output) for one in arrivals]
        outcomes, done = [Outcome(one, 0) for one in arrivals], threading.Semaphore(0)
        began = time.perf_counter()

        def deliver(outcome: Outcome) -> Callable[[Chunk], None]:
            def take(chunk: Chunk) -> None:
                assert chunk.error is None, chunk.error
                now = time.perf_counter() - began
                if chunk.token_ids and not outcome.first_token_s:
                    outcome.first_token_s = now
                if chunk.is_last:
                    outcome.last_token_s = now
                    done.release()

            return take

        for request, outcome in zip(requests, outcomes, strict=True):
            time.sleep(max(0.0, outcome.arrival.at_s - (time.perf_counter() - began)))
            self._engine.submit(request, deliver(outcome))
        for _ in arrivals:
            done.acquire()
        return outcomes

    def decode_s(self, sequences: int, prompt: int, tokens: int = 32) -> float:
        """Median seconds of a step in which so many sequences generate."""
        arrived: queue.SimpleQueue[float] = queue.SimpleQueue()
        ended = threading.Semaphore(0)
        for place in range(sequences):

            def take(chunk: Chunk, first: bool = place == 0) -> None:
                if first and chunk.token_ids:
                    arrived.put(time.perf_counter())
                if chunk.is_last:
                    ended.release()

            self._engine.submit(self._request(prompt, tokens), take)
        for _ in range(sequences):
            ended.acquire()
        times = [arrived.get() for _ in range(arrived.qsize())][8:]
        return statistics.median(b - a for a, b in pairwise(times))

    def prompt_s(self, tokens: int) -> float:
        """Median seconds from a prompt to its first token, on an idle engine."""
        return statistics.median(self.play([Arrival(0.0, tokens, 1)])[0].first_token_s for _ in range(5))

    def costs(self) -> Costs:
        """Fit the parts of a step; all observations count by their relative error."""
        rows, times = [], []
        for sequences in (1, 2, 3, 4):
            for prompt in (16, 200):
                rows.append((1, sequences, 0, sequences * (prompt + 20)))
                times.append(self.decode_s(sequences, prompt))
        for prompt in (16, 64, 128, 250):
            rows.append((1, 1, prompt, prompt))
            times.append(self.prompt_s(prompt))
        weight = 1 / np.array(times)
        found, *_ = np.linalg.lstsq(np.array(rows) * weight[:, None], np.ones(len(rows)), rcond=None)
        return Costs(*(float(max(0.0, one)) for one in found))


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """TTFT in ms and tokens/s, of all but the first tenth."""
    steady = outcomes[len(outcomes) // 10 :]
    ttft = [1e3 * one.ttft_s for one in steady]
    span = max(one.last_token_s for one in steady) - steady[0].arrival.at_s
    return {
        "ttft_p50_ms": float(np.percentile(ttft, 50)), "ttft_p90_ms": float(np.percentile(ttft, 90)),
        "tokens_per_s": sum(one.arrival.output for one in steady) / span,
    }  # fmt: skip


def schedule(rate: float, count: int, seed: int) -> list[Arrival]:
    return Traffic.model_validate(TRAFFIC | {"arrival": {"rate": rate}, "seed": seed}).arrivals(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=150, help="of each load (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, checkpoint, built = (Path(folder, name) for name in ("model", "checkpoint", "engine"))
        write_random_model(model, SHAPE)
        convert(model, checkpoint, precision="int8_weight_only", dtype="auto")
        cpu.build(checkpoint, built, cpu.CpuOptions(**vars(LIMITS)))
        engine = Engine.load(built)
        try:
            report = measure(Bench(engine, args.seed), args)
        finally:
            engine.close()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, object]:
    """All loads, one after the other."""
    burst = bench.play([Arrival(0.0, one.prompt, one.output) for one in schedule(1.0, 60, args.seed + 1)])
    capacity = len(burst) / max(one.last_token_s for one in burst)
    print(f"capacity: {capacity:.2f} requests/s; load of the machine: {os.getloadavg()[0]:.1f}", flush=True)
    rows, before = [], bench.costs()
    for share in SHARES:
        arrivals = schedule(share * capacity, args.requests, args.seed)
        measured = figures(bench.play(arrivals))
        after = bench.costs()
        costs = before.between(after)
        simulated = figures(simulate(arrivals, LIMITS, 4 * LIMITS.tokens_per_sequence, costs))
        ratios = {name: simulated[name] / value for name, value in measured.items()}
        rows.append({
            "share": share, "measured": measured, "simulated": simulated, "ratio": ratios, "costs": vars(costs),
            "before": vars(before), "after": vars(after), "load": os.getloadavg()[0],
        })  # fmt: skip
        for name, ratio in ratios.items():
            both = f"measured {measured[name]:.1f}, simulated {simulated[name]:.1f}"
            print(f"{share:.0%}: {name}: {both}: {ratio:.2f}", flush=True)
        print(f"     load of the machine: {os.getloadavg()[0]:.1f}", flush=True)
        before = after
    return {"capacity_requests_per_s": capacity, "requests": args.requests, "seed": args.seed, "loads": rows}


if __name__ == "__main__":
    main()
