"""Rounding to float16 in float32, against numpy's own conversion there and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from minitron_build.checkpoint.rounding import rounded

HALVES: npt.NDArray[np.float32] = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)


def by_numpy(values: npt.NDArray[Any], dtype: Any) -> npt.NDArray[np.float32]:
    return values.astype(dtype).astype(np.float32)


def test_every_float16_and_every_tie_and_their_neighbours() -> None:
    ties = (HALVES[:-1] + HALVES[1:]) / 2  # exact: float32 has 13 bits more
    near = np.concatenate([HALVES, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    values = np.concatenate([near, -near])
    found = rounded(values, np.dtype(np.float16))
    assert np.array_equal(found.view(np.uint32), by_numpy(values, np.float16).view(np.uint32))  # -0 stays -0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_bits_from_any_type_to_any(stored: Any, dtype: Any) -> None:
    pick = np.random.default_rng(8)
    values = pick.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    values = values[np.abs(values) < 60000].astype(stored)
    kept = values.copy()
    found = rounded(values, np.dtype(dtype))
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), by_numpy(kept, dtype).view(np.uint32))
    assert np.array_equal(values.view(np.uint8), kept.view(np.uint8)), "the argument was changed"
