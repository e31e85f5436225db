"""Two runs beside each other: each figure with its interval, the ratio, and whether the difference is real.

The window of each run is cut into ten parts that stand for repeats: requests near each other in time are not
independent. A difference is called real when the 95 % interval of the ratio, by a bootstrap over those parts and the
values in them, leaves out 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minitron_client.bench.record import METRICS, OK
from minitron_client.bench.statistics import Estimate, percentile, percentiles
from minitron_client.report.reading import Run

_PARTS = 10
_RESAMPLES = 400
_METRICS = {"ttft_intended": "TTFT (intended)", "itl": "ITL", "tpot": "TPOT", "e2e_intended": "E2E (intended)"}
SHARES = (50, 99)


@dataclass(frozen=True)
class Difference:
    """A percentile of a metric in ms in two runs: ``ratio`` is the second over the first."""

    metric: str
    share: int
    first: Estimate
    second: Estimate
    ratio: Estimate

    @property
    def real(self) -> bool:
        """Whether the interval of the ratio leaves out 1."""
        low, high = self.ratio.low, self.ratio.high
        return low is not None and high is not None and not low <= 1 <= high


def compare(first: Run, second: Run, seed: int = 0) -> list[Difference]:
    """Every metric that both runs have, each at the percentiles for which both have values enough."""
    draw = np.random.default_rng(seed)
    found = []
    for metric, name in _METRICS.items():
        ours, theirs = _parts(first, metric), _parts(second, metric)
        if not (ours and theirs):
            continue
        estimates = percentiles(ours), percentiles(theirs)
        for share in SHARES:
            one, two = estimates[0][share], estimates[1][share]
            if one is None or two is None:
                continue
            ratios = [_resampled(theirs, share, draw) / _resampled(ours, share, draw) for _ in range(_RESAMPLES)]
            low, high = (float(value) for value in np.quantile(ratios, (0.025, 0.975)))
            found.append(Difference(name, share, one, two, Estimate(two.value / one.value, low, high)))
    return found


def _parts(run: Run, metric: str) -> list[NDArray[np.float64]]:
    """The values in ms of the good requests meant for each part of the window; parts without any are left out."""
    parts: list[list[int]] = [[] for _ in range(_PARTS)]
    for record in run.records:
        if record.outcome == OK and run.window.holds(record.intended_ns):
            parts[run.window.part(record.intended_ns)] += METRICS[metric].values(record)
    return [np.array(part) / 1e6 for part in parts if part]


def _resampled(parts: list[NDArray[np.float64]], share: int, draw: np.random.Generator) -> float:
    chosen = [parts[index] for index in draw.integers(len(parts), size=len(parts))]
    return percentile(np.concatenate([draw.choice(part, len(part)) for part in chosen]), share)
