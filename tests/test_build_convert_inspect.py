"""``minitron inspect`` and the pieces a reader of codes is made of; errors are computed here from whole arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import random_model
from conftest import DATA, minitron
from minitron.errors import CheckpointError
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.inspect import inspect
from minitron_build.checkpoint.read import Checkpoint
from nemotron_reference import source_weights

GOLDEN = DATA / "golden" / "trtllm_checkpoint"
HF = GOLDEN / "a" / "hf"
DENSE = "transformer.layers.1.attention.dense"


def test_every_tensor_is_listed_with_its_size(tmp_path: Path) -> None:
    """Against index.json of the golden data."""
    tensors: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())["models"]["a"]["variants"]
    listed = inspect(GOLDEN / "a" / "int4_wo_fp16_tp2")
    for rank, wanted in enumerate(tensors["int4_wo_fp16_tp2"]["ranks"]):
        found = {stored.name: [stored.dtype, list(stored.shape)] for stored in listed if stored.rank == rank}
        assert found == {name: entry[:2] for name, entry in wanted.items()}
    stored_bytes = sum(
        array.nbytes for array in load_file(GOLDEN / "a" / "int4_wo_fp16_tp2" / "rank1.safetensors").values()
    )
    assert sum(stored.nbytes for stored in listed if stored.rank == 1) == stored_bytes


@pytest.mark.parametrize(("precision", "tp"), [("int8_weight_only", 2), ("int4_weight_only", 1), ("float16", 1)])
def test_relative_errors_are_those_of_the_whole_arrays(precision: str, tp: int, tmp_path: Path) -> None:
    """The layout is held to the golden data elsewhere; here the sums are made once more, from whole arrays."""
    convert(HF, tmp_path / "out", precision=precision, tp=tp)
    errors = {(stored.rank, stored.name): stored.relative_error for stored in inspect(tmp_path / "out", str(HF))}
    assert errors[0, "rotary_inv_freq"] is None
    assert errors[0, "transformer.layers.0.input_layernorm.bias"] == 0
    assert errors[0, "transformer.ln_f.weight"] == pytest.approx(0.001, abs=0.001)  # one rounding of weight + 1
    source = source_weights(HF)["model.layers.1.self_attn.o_proj.weight"]
    for rank, wanted in enumerate(np.split(source, tp, axis=1)):
        found = _dense(tmp_path / "out", rank)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert errors[rank, f"{DENSE}.weight"] == pytest.approx(error, rel=1e-4)
    assert errors[0, f"{DENSE}.weight"] == pytest.approx({8: 0.006, 4: 0.11, 16: 0.0}[_bits(precision)], abs=0.02)


def _bits(precision: str) -> int:
    return {"int8_weight_only": 8, "int4_weight_only": 4}.get(precision, 16)


def _dense(folder: Path, rank: int) -> Any:
    with Checkpoint.open(folder) as checkpoint:
        if not checkpoint.quantized:
            return checkpoint.array(f"{DENSE}.weight", rank).astype(np.float64)
        scales = checkpoint.array(f"{DENSE}.per_channel_scale", rank).astype(np.float64)
        return checkpoint.codes(f"{DENSE}.weight", rank=rank) * scales[:, None]


@pytest.mark.parametrize("precision", ["int8_weight_only", "int4_weight_only"])
def test_some_channels_are_those_of_all(precision: str, tmp_path: Path) -> None:
    convert(HF, tmp_path / "out", precision=precision)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        whole = checkpoint.codes(f"{DENSE}.weight")
        assert whole.shape == (128, 128)
        assert np.array_equal(checkpoint.codes(f"{DENSE}.weight", 64, 128), whole[64:])


def test_another_model_is_no_source(tmp_path: Path) -> None:
    convert(HF, tmp_path / "out")
    random_model.write_random_model(tmp_path / "other", random_model.SHAPES["tiny"], tokenizer=False)
    with pytest.raises(CheckpointError, match="their sizes differ"):
        inspect(tmp_path / "out", str(tmp_path / "other"))


def test_the_command_prints_a_table_or_one_document(tmp_path: Path) -> None:
    folder = GOLDEN / "a" / "int8_wo_fp16"
    table = minitron("inspect", folder, "--source", HF).stdout
    assert "31 tensors, 333.3 kB (F16 87.6 kB, F32 16.4 kB, I8 229.4 kB)" in table
    assert "relative error" in table
    document = json.loads(minitron("inspect", folder, "--json").stdout)
    assert (len(document["tensors"]), document["bytes"]) == (31, 333344)
    assert minitron("inspect", tmp_path, check=False).returncode == 3
