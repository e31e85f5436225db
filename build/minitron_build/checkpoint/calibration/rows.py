"""Element-wise work on matrices, on all cores: numpy computes an element at a time, but lets other threads run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_build.checkpoint.write import threads

Floats = npt.NDArray[np.float32]

_ELEMENTS_AT_ONCE = 1 << 17
"""So few that each step finds what the one before it left in the cache of a core."""


def by_rows(function: Callable[..., Floats], out: Floats, *matrices: npt.NDArray[Any]) -> Floats:
    """``out``, whose rows become what ``function`` makes of the same rows of the ``matrices``, a few at a time.

    Where a row's result depends on that row alone, it does not depend on the number of cores. No product of matrices
    belongs in ``function``: BLAS has threads of its own, which wait for each other where there are more than cores.
    """
    step = max(_ELEMENTS_AT_ONCE * len(out) // matrices[0].size, 1)

    def some(start: int) -> None:
        rows = slice(start, start + step)
        out[rows] = function(*(matrix[rows] for matrix in matrices))

    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(some, range(0, len(out), step)):
            pass  # an error in a thread is raised here
    return out
