"""The latency test's document judged: all answered, below the roofline, beside 16-bit weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.checks import SKIPPED, Check, judge
from minitron.errors import InputError
from minitron.recipe_model import Percentiles, Recipe

#: What one stream of a weight-only engine may lose against 16 bits before it is called slower (noise of a repeat).
SLOWER = 0.95
#: How many times a 16-bit engine's first token at a long prompt may take: weight-only kernels unpack every code there,
#: and lost on an A100 (NVIDIA/TensorRT-LLM#2553), so that a loss is no fault, and such a one is.
SLOWER_PREFILL = 1.5
_PREFILL_TOKENS, _PREFILL_OUTPUT = 1024, 2
_BURSTS, _BURST_OUTPUT = (4, 32), 64
_DEFAULT_TOKENS = 128
_LEAST_TOKENS = 2


def grid(recipe: Recipe) -> tuple[str, ...]:
    """Three points of the recipe's own workload: one stream, a quarter of its concurrency, all of it."""
    lengths = f"{_typical(recipe.workload.input_tokens)}:{_typical(recipe.workload.output_tokens)}"
    most = recipe.workload.concurrency
    return tuple(f"{lengths}:{streams}" for streams in dict.fromkeys((1, max(2, most // 4), max(3, most))))


def prefill_point(recipe: Recipe) -> str:
    """One stream with a prompt of 1,024 tokens, or the longest that the recipe serves: what its first token takes."""
    asked = recipe.workload.input_tokens
    longest = recipe.limits.max_input_len or (asked.max if isinstance(asked, Percentiles) else asked) or _PREFILL_TOKENS
    return f"{min(_PREFILL_TOKENS, longest)}:{_PREFILL_OUTPUT}:1"


def _typical(tokens: int | Percentiles | None) -> int:
    value = tokens.p50 if isinstance(tokens, Percentiles) else tokens
    return max(_LEAST_TOKENS, value or _DEFAULT_TOKENS)


def bursts(grid: Sequence[str]) -> tuple[str, ...]:
    """4 and 32 streams that come at once, as long as those of the grid's first point but for the output, at most 64."""
    tokens, output, _ = grid[0].split(":")
    return tuple(f"{tokens}:{min(int(output), _BURST_OUTPUT)}:{streams}" for streams in _BURSTS)


def sixteen_bit(recipe: Recipe) -> Recipe:
    """The same recipe without weight-only quantisation: its activation type is its precision."""
    return recipe.model_copy(update={"precision": recipe.dtype, "dtype": "auto"})


def read(path: Path) -> Mapping[str, Any]:
    """A document of ``minitron bench --output``; raises InputError."""
    try:
        loaded: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if loaded["kind"] != "latency" or not loaded["points"]:
            raise ValueError("it is no latency result")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a latency result ({error})") from error
    return loaded


def judge_speed(measured: Mapping[str, Any]) -> list[Check]:
    """The lines of step ``speed``."""
    return [judge("speed.measured", [], shown(measured)), _roofline(measured)]


def shown(document: Mapping[str, Any]) -> str:
    """Each point in a few words."""
    return "; ".join(f"{_name(point)} {_rate(point):.1f} tokens/s, TTFT {_ttft(point)}" for point in document["points"])


def failures(document: Mapping[str, Any]) -> str:
    """What failed at which point, and how often."""
    counted = [(_name(point), *one) for point in document["points"] for one in (point.get("failures") or {}).items()]
    return "; ".join(f"{name} {kind} x {count}" for name, kind, count in counted)


def _roofline(measured: Mapping[str, Any]) -> Check:
    roofline = measured.get("roofline")
    if not roofline:
        return Check("speed.roofline", SKIPPED, "the plan has no roofline for this target")
    single, problems, shares = float(roofline["single_tokens_per_s"]), [], []
    for point in measured["points"]:
        bound = single * point["point"]["concurrency"]
        shares.append(f"{_name(point)} {_rate(point) / bound:.0%}")
        if _rate(point) > bound:
            problems.append(f"{_name(point)}: {_rate(point):.1f} tokens/s, and {bound:.1f} is the roofline")
    return judge("speed.roofline", problems, "of the roofline: " + ", ".join(shares))


def judge_beside(measured: Mapping[str, Any], baseline: Mapping[str, Any] | None, *, on_gpu: bool) -> Check:
    """``speed.baseline``: what the same engine with 16-bit weights does at the same points."""
    if baseline is None:
        return Check("speed.baseline", SKIPPED, "no 16-bit run to compare with")
    ratios = _ratios(measured, baseline, _rate)
    slower = {name: 1 / ratio for name, ratio in _ratios(baseline, measured, _ttft_ms).items() if _is_prefill(name)}
    text = "tokens/s by those of 16 bits: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    text += "; TTFT by theirs: " + (", ".join(f"{name} {ratio:.2f}" for name, ratio in slower.items()) or "unknown")
    if not on_gpu:
        return Check("speed.baseline", SKIPPED, f"{text}; a CPU's ratio says nothing about a GPU")
    slow = [
        f"{name}: {ratio:.2f} of the tokens/s with 16 bits"
        for name, ratio in ratios.items()
        if name.endswith(":1") and not _is_prefill(name) and ratio < SLOWER
    ]
    slow += [f"{name}: the first token takes {ratio:.2f} times as long as with 16 bits"
             for name, ratio in slower.items() if ratio > SLOWER_PREFILL]  # fmt: skip
    if not slow and not slower:
        return Check("speed.baseline", SKIPPED, f"{text}: the 16-bit run has no TTFT of a long prompt to compare with")
    return judge("speed.baseline", slow, text)


def _ratios(
    one: Mapping[str, Any], other: Mapping[str, Any], figure: Callable[[Mapping[str, Any]], float]
) -> dict[str, float]:
    """``one``'s figure by ``other``'s at each point that both have."""
    by = {_name(point): figure(point) for point in other["points"]}
    found = {_name(point): figure(point) for point in one["points"]}
    return {name: value / by[name] for name, value in found.items() if value and by.get(name)}


def _is_prefill(name: str) -> bool:
    return name.endswith(f":{_PREFILL_OUTPUT}:1")


def _name(point: Mapping[str, Any]) -> str:
    return "{input_tokens}:{output_tokens}:{concurrency}".format(**point["point"])


def _rate(point: Mapping[str, Any]) -> float:
    return float((point["tokens_per_s"] or {"value": 0.0})["value"])


def _ttft(point: Mapping[str, Any]) -> str:
    return f"{_ttft_ms(point):.1f} ms" if _ttft_ms(point) else "-"


def _ttft_ms(point: Mapping[str, Any]) -> float:
    median = point["metrics"].get("ttft_ms", {}).get("p50")
    return float(median["value"]) if median else 0.0
