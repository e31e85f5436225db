"""The latency test's document judged: all answered, below the roofline, beside 16-bit weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_trtllm.acceptance.lines import SKIPPED, Line, judge
from minitron_trtllm.errors import InputError
from minitron_trtllm.recipe_model import Percentiles, Recipe

#: What one stream of a weight-only engine may lose against 16 bits before it is called slower (noise of a repeat).
SLOWER = 0.95
_DEFAULT_TOKENS = 128
_LEAST_TOKENS = 2


def grid(recipe: Recipe) -> tuple[str, ...]:
    """Three points of the recipe's own workload: one stream, a quarter of its concurrency, all of it."""
    lengths = f"{_typical(recipe.workload.input_tokens)}:{_typical(recipe.workload.output_tokens)}"
    most = recipe.workload.concurrency
    return tuple(f"{lengths}:{streams}" for streams in dict.fromkeys((1, max(2, most // 4), max(3, most))))


def _typical(tokens: int | Percentiles | None) -> int:
    value = tokens.p50 if isinstance(tokens, Percentiles) else tokens
    return max(_LEAST_TOKENS, value or _DEFAULT_TOKENS)


def is_weight_only(recipe: Recipe) -> bool:
    """Whether there is a 16-bit engine to compare with."""
    return recipe.precision in ("int8_weight_only", "int4_weight_only")


def sixteen_bit(recipe: Recipe) -> Recipe:
    """The same recipe without weight-only quantisation: its activation type is its precision."""
    return recipe.model_copy(update={"precision": recipe.dtype, "dtype": "auto"})


def read(path: Path) -> Mapping[str, Any]:
    """A document of ``minitron latency --output``; raises InputError."""
    try:
        loaded: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if loaded["kind"] != "latency" or not loaded["points"]:
            raise ValueError("it is no latency result")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a latency result ({error})") from error
    return loaded


def judge_speed(measured: Mapping[str, Any], baseline: Mapping[str, Any] | None, *, on_gpu: bool) -> list[Line]:
    """The three lines of step ``speed``."""
    return [judge("speed.measured", [], shown(measured)), _roofline(measured), _beside(measured, baseline, on_gpu)]


def shown(document: Mapping[str, Any]) -> str:
    """Each point in a few words."""
    return "; ".join(f"{_name(point)} {_rate(point):.1f} tokens/s, TTFT {_ttft(point)}" for point in document["points"])


def _roofline(measured: Mapping[str, Any]) -> Line:
    roofline = measured.get("roofline")
    if not roofline:
        return Line("speed.roofline", SKIPPED, "the plan has no roofline for this target")
    single, problems, shares = float(roofline["single_tokens_per_s"]), [], []
    for point in measured["points"]:
        bound = single * point["point"]["concurrency"]
        shares.append(f"{_name(point)} {_rate(point) / bound:.0%}")
        if _rate(point) > bound:
            problems.append(f"{_name(point)}: {_rate(point):.1f} tokens/s, and {bound:.1f} is the roofline")
    return judge("speed.roofline", problems, "of the roofline: " + ", ".join(shares))


def _beside(measured: Mapping[str, Any], baseline: Mapping[str, Any] | None, on_gpu: bool) -> Line:
    if baseline is None:
        return Line("speed.baseline", SKIPPED, "no 16-bit run to compare with")
    theirs = {_name(point): _rate(point) for point in baseline["points"]}
    ratios = {
        _name(point): _rate(point) / theirs[_name(point)] for point in measured["points"] if theirs.get(_name(point))
    }
    text = "tokens/s by those of 16 bits: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    if not on_gpu:
        return Line("speed.baseline", SKIPPED, f"{text}; a CPU's ratio says nothing about a GPU")
    slow = [f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if name.endswith(":1") and ratio < SLOWER]
    return judge("speed.baseline", [f"{one} of the tokens/s with 16 bits" for one in slow], text)


def _name(point: Mapping[str, Any]) -> str:
    return "{input_tokens}:{output_tokens}:{concurrency}".format(**point["point"])


def _rate(point: Mapping[str, Any]) -> float:
    return float((point["tokens_per_s"] or {"value": 0.0})["value"])


def _ttft(point: Mapping[str, Any]) -> str:
    median = point["metrics"].get("ttft_ms", {}).get("p50")
    return f"{median['value']:.1f} ms" if median else "-"
