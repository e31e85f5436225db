"""The search behind ``int4_awq``: which inputs of a matrix to make larger before it is rounded, and where to clip.

Idea: J. Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978). A weight whose input is large costs
more when it is rounded; multiplied by a number above 1, with its input divided by it, it is rounded finer at the
expense of the others of its group. The numbers are the mean magnitudes of the inputs to the power of a ``strength``;
taken is the strength that changes the matrix's outputs least, on sampled inputs. Then the scale of each group of each
row is made smaller step by step where that helps its own share of the output, over all calibration tokens, and the
codes are chosen with ``feedback``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_build.checkpoint import groups
from minitron_build.checkpoint.calibration import feedback
from minitron_build.checkpoint.calibration.rows import by_rows
from minitron_build.checkpoint.rounding import rounded

Floats = npt.NDArray[np.float32]

STRENGTHS = tuple(step / 10 for step in range(11))
"""0 leaves the matrix as it is."""

CLIPS = tuple(1 - step / 24 for step in range(13))
"""Shares of a group's largest magnitude that its scale may cover: 1 down to 0.5."""

_SMALLEST_SHARE = np.float32(1e-4)
"""Inputs below this share of the largest mean magnitude count as that: a dead input must not blow its weights up."""

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs x of a matrix, over the tokens of a text.

    ``mean`` of |x| [in], a ``sample`` [rows, in] of them, and ``gram`` [in, in], the sum of x x^T.
    """

    mean: Floats
    sample: Floats
    gram: Floats


@dataclass(frozen=True)
class Found:
    """``factors`` [in] multiply the inputs; the weights, divided by them, are ``codes`` x ``scales`` [out, in / group].

    ``error``: sum of squares of what changes in the sampled outputs, relative to that of the outputs; ``plain_error``:
    the same for plain rounding in groups.
    """

    factors: Floats
    scales: Floats
    codes: groups.Codes
    strength: float
    error: float
    plain_error: float


def search(weights: Floats, inputs: Inputs, group: int, dtype: np.dtype[Any]) -> Found:
    """Factors, scales and codes for ``weights`` [out, in], which are rounded to ``dtype`` already.

    Factors and scales are values of ``dtype``: TensorRT-LLM keeps the former in it, and casts the latter to it when it
    loads them.
    """
    strength, factors, plain = _strongest(weights, inputs, group, dtype)
    turned = divided(weights, factors, dtype)
    gram = inputs.gram * factors
    gram *= factors[:, None]
    scales = clipped(turned, gram, group, dtype)
    codes = feedback.quantize(turned, scales, gram)
    off = by_rows(partial(_off, factors=factors), turned, weights, codes, scales)
    size = _squares(inputs.sample @ weights.T) or 1.0
    return Found(factors, scales, codes, strength, _squares(inputs.sample @ off.T) / size, plain / size)


def _strongest(weights: Floats, inputs: Inputs, group: int, dtype: np.dtype[Any]) -> tuple[float, Floats, float]:
    """The strength that costs least when codes are to nearest, its factors, and what no factors cost."""
    tried, off = [], np.empty_like(weights)
    for strength, factors in _candidates(inputs.mean, dtype):
        by_rows(partial(_off_when_nearest, factors=factors, group=group, dtype=dtype), off, weights)
        tried.append((_squares(inputs.sample @ off.T), strength, factors))
    _, strength, factors = min(tried, key=lambda each: each[0])
    return strength, factors, tried[0][0]


def divided(weights: Floats, factors: Floats, dtype: np.dtype[Any]) -> Floats:
    """``weights`` [out, in] for inputs that are multiplied by ``factors`` [in], rounded to ``dtype``."""
    return rounded(weights * (np.float32(1) / factors), dtype)


def clipped(weights: Floats, gram: Floats, group: int, dtype: np.dtype[Any]) -> Floats:
    """Scales [out, groups] in ``dtype``: for each group that of ``CLIPS`` whose codes change its output least.

    ``gram`` is that of the inputs that ``weights`` [out, in] are multiplied with.
    """
    blocks = np.stack([gram[start : start + group, start : start + group] for start in range(0, len(gram), group)])
    unclipped = groups.scales_of(weights, group)
    found = np.empty_like(unclipped)
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        found[rows] = _least(weights[rows], unclipped[rows], blocks, dtype)
    return found


def _least(weights: Floats, unclipped: Floats, blocks: Floats, dtype: np.dtype[Any]) -> Floats:
    best, least = rounded(unclipped, dtype), np.full(unclipped.shape, np.inf, np.float32)
    for share in CLIPS:
        scales = rounded(unclipped * np.float32(share), dtype)
        off = groups.grouped(groups.dequantize(groups.quantize(weights, scales), scales) - weights, scales)
        by_group = off.swapaxes(0, 1)  # [groups, rows, group]
        cost = np.einsum("gri,gri->rg", by_group @ blocks, by_group)
        better = cost < least
        best[better], least[better] = scales[better], cost[better]
    return best


def _candidates(mean: Floats, dtype: np.dtype[Any]) -> Iterator[tuple[float, Floats]]:
    """Strengths with the factors that they make, around 1, the weakest (all 1) first."""
    shares = np.maximum(mean / (mean.max() or np.float32(1)), _SMALLEST_SHARE)
    for strength in STRENGTHS:
        factors = shares ** np.float32(-strength)
        yield strength, rounded(factors / np.sqrt(factors.max() * factors.min()), dtype)


def _off(weights: Floats, codes: groups.Codes, scales: Floats, factors: Floats) -> Floats:
    """What ``codes`` change in ``weights``."""
    off = groups.dequantize(codes, scales)
    off *= factors
    off -= weights
    return off


def _off_when_nearest(weights: Floats, factors: Floats, group: int, dtype: np.dtype[Any]) -> Floats:
    turned = divided(weights, factors, dtype)
    scales = rounded(groups.scales_of(turned, group), dtype)
    return _off(weights, groups.quantize(turned, scales), scales, factors)


def _squares(values: Floats) -> float:
    return float(np.vdot(values, values))
