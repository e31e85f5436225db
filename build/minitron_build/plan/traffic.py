"""How many servers and gateways a traffic needs, by simulation on the plan's roofline.

The traffic is a schedule of arrivals: when, and how long. The roofline is what no engine beats, so the answer is the
least number that can do; ``share`` says what part of it an engine reaches, once measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minitron import console
from minitron.errors import UsageError
from minitron_build.plan import gateway, weights
from minitron_build.plan.engine_plan import EnginePlan
from minitron_build.plan.roofline import Machine
from minitron_build.plan.simulation import Arrival, Outcome, roofline_steps, simulate

#: Share of the requests that must meet the limits.
GOOD = 0.95
_MOST_SERVERS = 64


@dataclass(frozen=True)
class Slo:
    """Limits that a good request meets, both; in seconds: to the first token, and between those behind it (mean)."""

    ttft_s: float
    itl_s: float

    @classmethod
    def parse(cls, text: str) -> Slo:
        """``TTFT,ITL`` in milliseconds; raises UsageError."""
        try:
            ttft_ms, itl_ms = (float(word) for word in text.split(","))
        except ValueError:
            raise UsageError(f"--slo {text!r} is no TTFT,ITL in milliseconds, such as 500,50") from None
        if not (0 < ttft_ms < math.inf and 0 < itl_ms < math.inf):
            raise UsageError(f"--slo {text!r}: both must be above 0")
        return cls(ttft_ms / 1e3, itl_ms / 1e3)

    def holds(self, one: Outcome) -> bool:
        """Whether a request met both."""
        return one.ttft_s <= self.ttft_s and (one.tpot_s is None or one.tpot_s <= self.itl_s)


@dataclass(frozen=True)
class Result:
    """What so many servers make of the traffic. Times in seconds; ``good`` is the share that met the limits."""

    servers: int
    good: float
    ttft_p50_s: float
    ttft_p90_s: float
    itl_p50_s: float
    itl_p90_s: float
    tokens_per_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], slo: Slo, servers: int) -> Result:
        """Of all requests but the first tenth, in which the servers fill."""
        steady = outcomes[len(outcomes) // 10 :]
        ttft = sorted(one.ttft_s for one in steady)
        itl = sorted(one.tpot_s for one in steady if one.tpot_s is not None) or [0.0]
        span = max(one.last_token_s for one in steady) - steady[0].arrival.at_s
        good, tokens = sum(map(slo.holds, steady)) / len(steady), sum(one.arrival.output for one in steady)
        return cls(servers, good, _at(ttft, 0.5), _at(ttft, 0.9), _at(itl, 0.5), _at(itl, 0.9), tokens / span)


@dataclass(frozen=True)
class Sizing:
    """The least servers that keep the limits for 95 % of the requests, what fewer would do, and the gateways for them.

    ``servers`` None: more than could be tried. ``share``: of the roofline that was assumed.
    """

    rate: float
    slo: Slo
    share: float
    servers: int | None
    gateway_workers: int | None
    tried: tuple[Result, ...]

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def size(
    plan: EnginePlan, machine: Machine | None, arrivals: Sequence[Arrival], slo: Slo, *, share: float = 1.0
) -> Sizing:
    """Simulate one server, two, and so on, until the limits are kept.

    ``machine``: this machine, for target cpu; ``arrivals`` in the order of time. Raises UsageError where the engine
    refuses some of them.
    """
    if plan.gpu:
        machine = Machine(plan.gpu.bandwidth * plan.parallel.tensor, plan.gpu.dense_flops * plan.parallel.tensor)
    if machine is None:
        raise UsageError("without this machine's --bandwidth there is no roofline for target cpu")
    longest = max(one.prompt + one.output for one in arrivals)
    if longest > plan.limits.max_seq_len:
        raise UsageError(
            f"the traffic has requests of {longest} tokens and the engine takes {plan.limits.max_seq_len}: give the "
            "recipe's workload the lengths of the traffic"
        )
    bound = roofline_steps(
        plan.model.shape, machine, matrix_bytes=plan.weights[plan.precision.value].read_per_token,
        kv_bytes=weights.kv_bytes_per_token(plan.model.shape, element_bytes=plan.kv_element_bytes),
    )  # fmt: skip
    kv_tokens = _kv_tokens(plan)
    tried: list[Result] = []
    for servers in range(_least_servers(plan, arrivals, share), _MOST_SERVERS + 1):
        outcomes = simulate(arrivals, plan.limits, kv_tokens, lambda step: bound(step) / share, servers=servers)
        tried.append(Result.of(outcomes, slo, servers))
        if tried[-1].good >= GOOD:
            break
        if len(tried) > 1 and tried[-1].ttft_p90_s < slo.ttft_s / 4 and tried[-1].good <= tried[-2].good:
            break  # it is the speed of a step, and no number of servers mends that
    found = tried[-1] if tried[-1].good >= GOOD else None
    workers = gateway.for_rate(found.tokens_per_s).workers if found and plan.gateway else None
    return Sizing(
        len(arrivals) / arrivals[-1].at_s, slo, share, found.servers if found else None, workers, tuple(tried)
    )


def _least_servers(plan: EnginePlan, arrivals: Sequence[Arrival], share: float) -> int:
    """Servers that could make the answers' tokens if they did nothing else: fewer need not be tried."""
    if plan.roofline is None:
        return 1
    wanted = sum(one.output for one in arrivals) / arrivals[-1].at_s
    return min(_MOST_SERVERS, max(1, int(wanted / (share * plan.roofline.planned_tokens_per_s))))


def _kv_tokens(plan: EnginePlan) -> int:
    """Tokens that the cache holds: the plan's fraction on a GPU, a full batch of the longest on a CPU."""
    memory, fraction = plan.memory, plan.kv_cache_free_gpu_mem_fraction
    if fraction and memory.free_bytes:
        return int(memory.free_bytes * fraction) // memory.kv_bytes_per_token
    return plan.limits.max_batch_size * plan.limits.tokens_per_sequence


def text(sizing: Sizing) -> str:
    """The simulated numbers as a table, and what they say."""
    rows = [
        (one.servers, f"{100 * one.good:.1f} %", f"{1e3 * one.ttft_p50_s:.0f}", f"{1e3 * one.ttft_p90_s:.0f}",
         f"{1e3 * one.itl_p50_s:.1f}", f"{1e3 * one.itl_p90_s:.1f}", f"{one.tokens_per_s:,.0f}")
        for one in sizing.tried
    ]  # fmt: skip
    table = console.table(rows, ("servers", "good", "TTFT p50, ms", "p90", "ITL p50, ms", "p90", "tokens/s"))
    limits = f"{1e3 * sizing.slo.ttft_s:g} ms and {1e3 * sizing.slo.itl_s:g} ms"
    at = f"{sizing.rate:.3g} requests/s, {GOOD:.0%} of them within {limits}"
    how = "at the roofline, so at the least" if sizing.share == 1 else f"at {sizing.share:.0%} of the roofline"
    if sizing.servers is None:
        return f"{table}\nFor {at}: no number of servers, {how}; what is too slow is a single one."
    gateways = f", gateway workers: {sizing.gateway_workers}" if sizing.gateway_workers else ""
    return f"{table}\nFor {at}, {how}: servers: {sizing.servers}{gateways}."


def _at(ordered: Sequence[float], share: float) -> float:
    """A percentile by the nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
