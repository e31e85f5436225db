"""Percentiles and 95 % confidence intervals of measured values.

A percentile is a value that was measured (nearest rank), over the pooled values of all repeats, never a mean of
percentiles. A p99 of six values would be their largest under another name: there is none. Its interval comes from a
bootstrap that draws repeats first and values within them second, because values of one repeat are not independent (B.
Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 8). A mean over repeats has Student's t interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 99)
TOO_FEW = "-: of too few values; a p50 needs 2, a p90 10, a p99 100"
_RESAMPLES = 500
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom, as in any table; 1.96 beyond.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval; ``low`` and ``high`` are None where one repeat gives no interval."""

    value: float
    low: float | None
    high: float | None


def enough(share: int, count: int) -> bool:
    """Whether ``count`` values have a percentile ``share``: at least one of them must lie beyond it."""
    return count * (100 - share) >= 100


def shown(value: float | None, form: str = ".2f") -> str:
    """A figure in a table; "-" where there were too few values for it."""
    return "-" if value is None else format(value, form)


def remark(rows: Iterable[Sequence[str]]) -> list[str]:
    """What is said once below a table in which ``shown`` left something out."""
    return [TOO_FEW] if any("-" in row for row in rows) else []


def percentile(values: Sequence[float] | NDArray[Any], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least ``share`` percent of the values do not exceed.

    Whole numbers stay whole.
    """
    ordered = np.sort(np.asarray(values))
    return ordered[max(math.ceil(share / 100 * len(ordered)), 1) - 1].item()  # type: ignore[no-any-return]


def percentiles(repeats: Sequence[Sequence[float] | NDArray[Any]], seed: int = 0) -> dict[int, Estimate | None]:
    """``PERCENTILES`` of the pooled values of all repeats with bootstrap intervals, None for those of too few values;
    empty where there are no values.
    """
    groups = [np.asarray(values) for values in repeats if len(values)]
    if not groups:
        return {}
    pooled = np.concatenate(groups)
    intervals = _bootstrapped(groups, seed) if len(groups) > 1 else dict.fromkeys(PERCENTILES, (None, None))
    return {
        share: Estimate(percentile(pooled, share), *intervals[share]) if enough(share, len(pooled)) else None
        for share in PERCENTILES
    }


def _bootstrapped(groups: Sequence[NDArray[Any]], seed: int) -> Mapping[int, tuple[float, float] | tuple[None, None]]:
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(_RESAMPLES):
        chosen = [groups[i] for i in draw.integers(len(groups), size=len(groups))]
        sample = np.concatenate([draw.choice(values, len(values)) for values in chosen])
        samples.append([percentile(sample, share) for share in PERCENTILES])
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    return {share: (float(low[place]), float(high[place])) for place, share in enumerate(PERCENTILES)}


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean over repeats with Student's t interval; None without values."""
    if not values:
        return None
    middle = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(middle, None, None)
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
    freedom = len(values) - 1
    half = (_T975[freedom - 1] if freedom <= len(_T975) else 1.96) * deviation / math.sqrt(len(values))
    return Estimate(middle, middle - half, middle + half)
