"""The simulation behind ``minitron plan --traffic`` beside the CPU engine that it simulates.

The engine is asked in this process, without a server, with Poisson arrivals at 30, 60 and 90 % of the capacity that a
burst showed. Every step is timed, and a + b x sequences + c x prompt tokens + d x context tokens fitted to them: the
simulation gets the steps' time of that very run, and has to tell what follows from it for those who wait. So it is the
rules that are tried, and not how fast a busy machine will be in the next minute.

Two figures of each: ``steady``, on a machine that is as fast all the time, on which pauses that come in bursts count
against the simulation; and ``paced``, on one that is at each moment as fast as the real one was then.

    python benches/bench_sizing.py --json out/sizing.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tests", "models")]

import numpy as np  # noqa: E402

from minitron.model.shape import ModelShape  # noqa: E402
from minitron_build.checkpoint.convert import convert  # noqa: E402
from minitron_build.engines.openvino import write as cpu  # noqa: E402
from minitron_build.plan.limits import Limits  # noqa: E402
from minitron_build.plan.simulation import Arrival, EngineStep, Outcome, simulate  # noqa: E402
from minitron_client.bench import schedule as load_schedule  # noqa: E402
from minitron_client.bench.profile import Profile  # noqa: E402
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine  # noqa: E402
from minitron_triton.models.tensorrt_llm.generation import StepOutput  # noqa: E402
from minitron_triton.models.tensorrt_llm.generation_request import Request  # noqa: E402
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

    def __call__(self, step: EngineStep) -> float:
        parts = (self.sequence, step.sequences), (self.prompt, step.prompt_tokens), (self.context, step.context_tokens)
        return self.fixed + sum(cost * count for cost, count in parts)


class Paced:
    """Steps on a machine that is at each moment of a run as fast as it was: what a step costs has to be done, and in
    each step of the run as much was done as that one costs. Between steps, where nothing was seen, it is as usual."""

    def __init__(self, costs: Costs, steps: Sequence[tuple[EngineStep, float]]) -> None:
        self._costs = costs
        edges, done = [0.0], [0.0]
        for step, seconds in steps:
            idle_s = max(step.begins_s - edges[-1], 0.0)
            edges += [edges[-1] + idle_s, edges[-1] + idle_s + seconds]
            done += [done[-1] + idle_s, done[-1] + idle_s + costs(step)]
        self._edges, self._done = np.array(edges), np.array(done)

    def __call__(self, step: EngineStep) -> float:
        until = float(np.interp(step.begins_s, self._edges, self._done)) + self._costs(step)
        beyond_s = max(step.begins_s - float(self._edges[-1]), 0.0) + max(until - float(self._done[-1]), 0.0)
        ends_s = float(np.interp(until, self._done, self._edges)) + beyond_s
        return ends_s - step.begins_s


class Bench:
    """One engine, asked directly."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._random = engine, np.random.default_rng(seed)
        self.steps: list[tuple[EngineStep, float]] = []
        self._before, self._ended, self._began = set[int](), 0.0, 0.0
        self._read: dict[int, int] = {}  # tokens of prompts that were read, by request
        self._watch_steps()

    def _request(self, prompt: int, output: int) -> Request:
        ids = [int(one) for one in self._random.integers(4, SHAPE.vocab_size, prompt)]  # no two share a beginning
        return Request(ids, output, end_ids=frozenset())

    def play(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Send each request at its time, whatever became of those before; times as the schedule's."""
        requests = [self._request(one.prompt, one.output) for one in arrivals]
        outcomes, done = [Outcome(one, 0) for one in arrivals], threading.Semaphore(0)
        began = self._began = time.perf_counter()

        def deliver(outcome: Outcome) -> Callable[[StepOutput], None]:
            def take(chunk: StepOutput) -> None:
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

    def costs(self) -> Costs:
        """Fit the parts of a step to all steps, whose seconds the fit then adds up to.

        Pauses, of whatever step they fell into, are all steps' alike: those that took more than twice as long as a
        first fit says have no say in the second.
        """
        rows = np.array(
            [(1, one.sequences, one.prompt_tokens, one.context_tokens) for one, _ in self.steps], dtype=float
        )
        times = np.array([seconds for _, seconds in self.steps])
        usual = np.ones(len(times), dtype=bool)
        for _ in range(2):
            found, *_ = np.linalg.lstsq(rows[usual], times[usual], rcond=None)
            found = np.maximum(found, 0.0)
            ratios = times / (rows @ found)
            usual = ratios < 2 * np.median(ratios)
        return Costs(*(float(one) for one in found * times.sum() / (rows @ found).sum()))

    def _watch_steps(self) -> None:
        """Note each step of the engine: what it does, and how long."""
        engine, pipeline = self._engine, self._engine._pipeline
        step = pipeline.step

        class Watched:
            """The pipeline, with a clock."""

            def __getattr__(self, name: str) -> Any:
                return getattr(pipeline, name)

            @staticmethod
            def step() -> None:
                active = list(engine._active.values())
                generating = sum(bool(one.token_ids) for one in active)
                room, prompts, first = LIMITS.max_num_tokens - generating, 0, 0
                for one in active:  # whose prompts are read in pieces, by what the others leave
                    if not one.token_ids:
                        left = len(one.request.prompt) - self._read.get(one.id, 0)
                        piece = min(room, left)
                        self._read[one.id] = self._read.get(one.id, 0) + piece
                        room, prompts, first = room - piece, prompts + piece, first + (piece == left)
                context = sum(self._read[one.id] + len(one.token_ids) for one in active)
                # Between two steps of a busy engine lies the engine's own work, which belongs to the second.
                ids = {one.id for one in active}
                began = self._ended if ids & self._before else time.perf_counter()
                step()
                self._before, self._ended = ids, time.perf_counter()
                seen = EngineStep(generating + first, prompts, context, began - self._began)
                self.steps.append((seen, self._ended - began))

        engine._pipeline = Watched()


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
    own = TRAFFIC | {"arrival": {"rate": rate}, "seed": seed, "warm_up_s": 0, "duration_s": 10 + 2 * count / rate}
    planned = load_schedule.plan(Profile.model_validate(own))[:count]
    return [Arrival((one.at_ns or 0) / 1e9, one.input_tokens, one.output_tokens) for one in planned]


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
    rows = []
    for share in SHARES:
        arrivals = schedule(share * capacity, args.requests, args.seed)
        bench.steps = []
        measured = figures(bench.play(arrivals))
        costs = bench.costs()
        row = {"share": share, "measured": measured, "costs": vars(costs), "load": os.getloadavg()[0]}
        for kind, step_s in (("steady", costs), ("paced", Paced(costs, bench.steps))):
            simulated = figures(simulate(arrivals, LIMITS, 4 * LIMITS.tokens_per_sequence, step_s))
            ratios = {name: simulated[name] / value for name, value in measured.items()}
            row[kind] = {"simulated": simulated, "ratio": ratios}
            for name, ratio in ratios.items():
                both = f"measured {measured[name]:.1f}, simulated {simulated[name]:.1f}"
                print(f"{share:.0%}, {kind}: {name}: {both}: {ratio:.2f}", flush=True)
        rows.append(row)
        print(f"     load of the machine: {os.getloadavg()[0]:.1f}", flush=True)
    return {"capacity_requests_per_s": capacity, "requests": args.requests, "seed": args.seed, "loads": rows}


if __name__ == "__main__":
    main()
