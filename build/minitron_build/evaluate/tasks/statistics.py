"""Intervals of the difference between two models on the same or on different questions, and whether it can be chance.

Sources. Wilson's interval of a share, and that of the difference of two independent shares made of it: R. G. Newcombe,
Statistics in Medicine 17 (1998), 857-872 and 873-890, method 10. Of two shares of the same questions: D. G. Bonett and
R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012), 479-488, the adjusted Wald interval. Exact test
of the same: Q. McNemar, Psychometrika 12 (1947), 153-157, with the binomial distribution itself. Bootstrap of means:
B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), percentiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Of the normal distribution: 95 % lie within so many standard deviations.
Z = 1.959963984540054
_RESAMPLES = 10_000
_CHUNK = 1 << 22

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def share(right: float, count: int) -> Interval:
    """A share of ``count`` questions, by Wilson."""
    p = right / count
    middle, scale = p + Z * Z / (2 * count), 1 + Z * Z / count
    half = Z * math.sqrt(p * (1 - p) / count + Z * Z / (4 * count * count))
    return Interval(p, (middle - half) / scale, (middle + half) / scale)


def difference_of_shares(first: Interval, second: Interval) -> Interval:
    """First less second, of independent questions, from the interval of each."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, low, high)


def difference_of_paired_shares(only_first: int, only_second: int, count: int) -> Interval:
    """First less second, of ``count`` questions that both were asked, of which so many were right with one alone."""
    p, q = ((one + 1) / (count + 2) for one in (only_first, only_second))
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return Interval((only_first - only_second) / count, max(p - q - half, -1.0), min(p - q + half, 1.0))


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability of a split at least so uneven, were both equally good (exact, two-sided)."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(2 * tail / 2**count, 1.0) if count else 1.0


def difference_of_paired_values(first: Values, second: Values, seed: int = 0) -> Interval:
    """Mean of first less second, [question] each, by a bootstrap over the questions."""
    differences = first - second
    draw, means = np.random.default_rng(seed), []
    rows = max(_CHUNK // len(differences), 1)
    for begin in range(0, _RESAMPLES, rows):
        picked = draw.integers(len(differences), size=(min(rows, _RESAMPLES - begin), len(differences)))
        means.append(differences[picked].mean(axis=1))
    low, high = (float(one) for one in np.quantile(np.concatenate(means), (0.025, 0.975)))
    return Interval(float(differences.mean()), low, high)


def difference_of_means(first: tuple[float, float], second: tuple[float, float]) -> Interval:
    """First less second, each a mean and its standard error, of independent questions."""
    value, half = first[0] - second[0], Z * math.hypot(first[1], second[1])
    return Interval(value, value - half, value + half)
