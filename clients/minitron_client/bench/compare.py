"""A grid result beside others: the plan's roofline, a 16-bit run, and a baseline that gives a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron_client.bench.grid import SCHEMA, BenchPoint, BenchPointResult


@dataclass(frozen=True)
class Roofline:
    """What an engine could do at best: ``precision`` and decode tokens/s of one stream, by the engine's plan."""

    precision: str
    single_tokens_per_s: float

    def tokens_per_s(self, concurrency: int) -> float:
        """A bound from above for ``concurrency`` streams: all weights are read once for a token of every stream."""
        return concurrency * self.single_tokens_per_s


def read_roofline(folder: Path) -> Roofline | None:
    """The roofline in the manifest of an engine, or of the engine inside a repository; None where the plan has none.

    Raises InputError for a manifest that cannot be read.
    """
    for path in (folder if folder.is_file() else folder / "manifest.json", folder / "engine" / "manifest.json"):
        plan = _plan(path)
        if plan and plan.get("roofline"):
            precision = str(plan["precision"])
            return Roofline(precision, float(plan["roofline"]["single_tokens_per_s"][precision]))
    return None


def _plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))["details"].get("plan")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a manifest ({error})") from error
    return plan if isinstance(plan, dict) else None


def read_run(path: Path) -> dict[str, Any]:
    """A stored result of ``minitron bench --json``; raises InputError."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a file made with 'minitron bench --output'") from error
    if not isinstance(run, dict) or run.get("kind") != "latency" or run.get("schema") != SCHEMA:
        raise InputError(f"{path} is no result of a grid of this version; make it with 'minitron bench --output'")
    return run


def speedups(results: Sequence[BenchPointResult], run: Mapping[str, Any]) -> dict[BenchPoint, float]:
    """Tokens/s of each point over those of the same point in ``run``; points that the other lacks are absent."""
    theirs = {BenchPoint(**one["point"]): one["tokens_per_s"] for one in run["points"]}
    return {
        one.point: one.tokens_per_s.value / theirs[one.point]["value"]
        for one in results
        if one.tokens_per_s and theirs.get(one.point)
    }


def regressions(results: Sequence[BenchPointResult], run: Mapping[str, Any], tolerance: float) -> list[str]:
    """What became worse than in ``run`` by more than ``tolerance`` (a share) and by more than both intervals allow.

    Compared per point: medians of TTFT, TPOT and E2E, and tokens/s. A point or metric that is missing now is worse.
    """
    ours = {one.point: one.document() for one in results}
    found = []
    for old in run["points"]:
        point = BenchPoint(**old["point"])
        name = point.name
        if point not in ours:
            found.append(f"{name} was not measured")
            continue
        for metric in ("ttft_ms", "tpot_ms", "e2e_ms"):
            before = old["metrics"].get(metric, {}).get("p50")
            now = ours[point]["metrics"].get(metric, {}).get("p50")
            if before and _worse(before, now, tolerance, higher_is_worse=True):
                found.append(_sentence(name, f"{metric} p50", before, now))
        rate, now_rate = old["tokens_per_s"], ours[point]["tokens_per_s"]
        if rate and _worse(rate, now_rate, tolerance, higher_is_worse=False):
            found.append(_sentence(name, "tokens/s", rate, now_rate))
    return found


def _worse(
    before: Mapping[str, Any], now: Mapping[str, Any] | None, tolerance: float, *, higher_is_worse: bool
) -> bool:
    if now is None:
        return True
    sign = 1 if higher_is_worse else -1
    beyond = sign * (now["value"] - before["value"]) > tolerance * before["value"]
    near, far = ("low", "high") if higher_is_worse else ("high", "low")
    if now[near] is None or before[far] is None:
        return bool(beyond)
    return bool(beyond and sign * (now[near] - before[far]) > 0)


def _sentence(name: str, metric: str, before: Mapping[str, Any], now: Mapping[str, Any] | None) -> str:
    return (
        f"{name} {metric} was {before['value']:.4g} and is {'absent' if now is None else format(now['value'], '.4g')}"
    )
