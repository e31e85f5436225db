"""The sm80 layout of weight-only codes, against checkpoints that TensorRT-LLM's own code wrote (tests/data/golden)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import DATA
from minitron_build.checkpoint import layout
from minitron_build.checkpoint.read import Checkpoint

GOLDEN = DATA / "golden" / "trtllm_checkpoint" / "a"
QKV = "transformer.layers.0.attention.qkv"


@pytest.mark.parametrize(("folder", "bits"), [("int8_wo_fp16", 8), ("int4_wo_bf16", 4)])
def test_unpacked_golden_codes_times_scales_are_the_weights(folder: str, bits: int) -> None:
    """Meaning of the layout: code x scale is within half a step (one at the clamped top) of the float weight."""
    weights = _array(GOLDEN / ("fp16" if bits == 8 else "bf16"), f"{QKV}.weight")
    codes = layout.unpack(_array(GOLDEN / folder, f"{QKV}.weight", np.int8), bits)
    steps = np.abs(weights).max(axis=1, keepdims=True) / 2 ** (bits - 1)
    error = np.abs(codes * steps - weights)
    clamped = codes == 2 ** (bits - 1) - 1
    assert (error <= steps * np.where(clamped, 1.0001, 0.5001)).all()


@pytest.mark.parametrize(("folder", "bits"), [("int8_wo_fp16", 8), ("int4_wo_bf16", 4)])
def test_packing_unpacked_golden_tensors_restores_their_bytes(folder: str, bits: int) -> None:
    with Checkpoint.open(GOLDEN / folder) as checkpoint:
        names = [name for name in checkpoint.names() if checkpoint.entry(name).dtype == "I8"]
        assert len(names) == 8
        for name in names:
            stored = checkpoint.array(name)
            assert np.array_equal(layout.pack(layout.unpack(stored, bits), bits), stored), name


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=st.sampled_from([8, 4]), outs=st.integers(1, 3), ins=st.integers(1, 3))
def test_unpack_undoes_pack(data: st.DataObject, bits: int, outs: int, ins: int) -> None:
    top = 2 ** (bits - 1)
    codes = data.draw(hnp.arrays(np.int8, (64 * outs, 64 * ins), elements=st.integers(-top, top - 1)))
    stored = layout.pack(codes, bits)
    assert stored.shape == (64 * ins, 64 * outs * bits // 8)
    assert np.array_equal(layout.unpack(stored, bits), codes)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_sizes_that_are_not_multiples_of_64_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        layout.pack(np.zeros(shape, np.int8), 8)


def _array(folder: Path, name: str, dtype: Any = np.float32) -> npt.NDArray[Any]:
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.array(name).astype(dtype)
