"""A histogram of latencies that many processes fill and one merges without losing precision: HDR's layout in numpy.

Buckets double in width with every power of two, 512 of them to each, so that a percentile, read back as the middle of
its bucket, is within 1/1,024 (0.1 %) of the value recorded, whatever its size. Source: G. Tene, HdrHistogram
(hdrhistogram.org).
The package ``hdrhistogram`` (0.10.8) is well kept and does the same, but declares pbr and setuptools >= 83 as needed at
run time, and tensorrt-llm 1.2, in whose environment this toolkit is installed on a GPU machine, wants setuptools < 80.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_BITS = 10  # of a bucket's subdivision
_SUB = 1 << _BITS
_TOP_BIT = 42  # 2^42 ns are 73 minutes; what is longer counts as that
_SIZE = (_TOP_BIT - _BITS + 1) * _SUB


class Histogram:
    """Counts of values from 0 to 2^42 ns; larger ones count as the largest, negative ones as 0."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(_SIZE, np.int64)

    def record(self, values: Iterable[float]) -> None:
        """Count values in ns."""
        whole = np.clip(np.fromiter(values, np.float64), 0, 2**_TOP_BIT - 1).astype(np.int64)
        np.add.at(self._counts, _bucket(whole), 1)

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` counted."""
        self._counts += other._counts

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return int(self._counts.sum())

    def percentile(self, share: float) -> float | None:
        """The nearest-rank percentile in ns, as the middle of its bucket; None without values."""
        if not self.count:
            return None
        rank = max(math.ceil(share / 100 * self.count), 1)
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        low, width = _bounds(index)
        return low + (width - 1) / 2

    def document(self) -> dict[str, list[int]]:
        """The buckets in use, as JSON values."""
        used = np.flatnonzero(self._counts)
        return {"buckets": used.tolist(), "counts": self._counts[used].tolist()}

    @classmethod
    def of_document(cls, document: dict[str, list[int]]) -> Histogram:
        """Read ``document`` back."""
        made = cls()
        made._counts[document["buckets"]] = document["counts"]
        return made


def _bucket(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket of each value: below 1,024 its own; above, 512 for every power of two (half of each row stays empty)."""
    power = np.maximum(np.frexp(values.astype(np.float64))[1] - _BITS, 0).astype(np.int64)
    bucket: NDArray[np.int64] = power * _SUB + (values >> power)
    return bucket


def _bounds(index: int) -> tuple[int, int]:
    """Lowest value of a bucket, and how many values share it."""
    power, sub = divmod(index, _SUB)
    return sub << power, 1 << power
