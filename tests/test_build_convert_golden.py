"""Checkpoints against those that TensorRT-LLM's own code wrote: every variant and refusal of tests/data/golden.

index.json there lists type, shape and SHA-256 of each tensor and the full config.json; the rotary tables depend on the
numpy build and are compared by value with the files that are there too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import DATA
from minitron.errors import UsageError
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.read import Checkpoint

GOLDEN = DATA / "golden" / "trtllm_checkpoint"
INDEX = json.loads((GOLDEN / "index.json").read_text())
MODEL = INDEX["models"]["a"]
VARIANTS: dict[str, Any] = MODEL["variants"]
PRECISIONS = {"int8": "int8_weight_only", "int4": "int4_weight_only"}
#: Keys of 1.2's schema that other versions do not load, or that differ between them; they are left out on purpose.
LEFT_OUT = {"moe", "rotary_embedding_dim", "runtime_defaults"}


def _convert(arguments: dict[str, Any], output: Path) -> Path:
    weight_only = arguments["weight_only"]
    convert(
        GOLDEN / MODEL["hf"], output,
        precision=PRECISIONS[weight_only] if weight_only else arguments["dtype"], dtype=arguments["dtype"],
        tp=arguments["tp_size"], pp=arguments["pp_size"],
        use_parallel_embedding=arguments["use_parallel_embedding"],
        embedding_sharding_dim=arguments["embedding_sharding_dim"],
    )  # fmt: skip
    return output


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_the_golden_one(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    with Checkpoint.open(_convert(variant["args"], tmp_path / "out")) as checkpoint:
        assert checkpoint.spec.world_size == len(variant["ranks"])
        for rank, tensors in enumerate(variant["ranks"]):
            assert set(checkpoint.names(rank)) == set(tensors)
            for tensor, (dtype, shape, sha256) in tensors.items():
                entry = checkpoint.entry(tensor, rank)
                assert (entry.dtype, list(entry.shape)) == (dtype, shape), tensor
                if tensor not in INDEX["approx_tensors"]:
                    stored = checkpoint.array(tensor, rank).tobytes()
                    assert hashlib.sha256(stored).hexdigest() == sha256, f"{tensor} of rank {rank}"


@pytest.mark.parametrize("name", VARIANTS)
def test_config_is_the_portable_part_of_the_golden_one(name: str, tmp_path: Path) -> None:
    wanted = dict(VARIANTS[name]["config"])
    written = json.loads((_convert(VARIANTS[name]["args"], tmp_path / "out") / "config.json").read_text())
    assert set(wanted) - set(written) == LEFT_OUT
    mapping, quantization = written.pop("mapping"), written.pop("quantization")
    assert set(mapping) == {"world_size", "tp_size", "pp_size"}
    assert set(quantization) == {"quant_algo", "kv_cache_quant_algo"}
    assert mapping.items() <= wanted["mapping"].items()
    assert quantization.items() <= wanted["quantization"].items()
    for key, value in written.items():
        assert (value, type(value)) == (wanted[key], type(wanted[key])), key


@pytest.mark.parametrize("name", ["fp16", "int4_wo_fp16_tp2"])
def test_rotary_tables_are_the_golden_ones_within_the_last_bits(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    with Checkpoint.open(_convert(variant["args"], tmp_path / "out")) as checkpoint:
        for rank in range(len(variant["ranks"])):
            golden = load_file(GOLDEN / variant["data"] / f"rank{rank}.safetensors")
            for tensor in INDEX["approx_tensors"]:
                np.testing.assert_allclose(checkpoint.array(tensor, rank), golden[tensor], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reject", MODEL["rejects"], ids=lambda reject: str(reject["why"])[:30])
def test_what_the_official_converter_refuses_is_refused(reject: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not divide|no multiple of 64"):
        _convert(reject["args"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_official_files_are_read_as_they_are() -> None:
    """Checkpoints with the whole 1.2 config.json open, and say what they are."""
    for variant in VARIANTS.values():
        if variant["data"]:
            with Checkpoint.open(GOLDEN / variant["data"]) as checkpoint:
                assert checkpoint.dtype == variant["config"]["dtype"]
                assert (
                    checkpoint.precision.quant_algo(checkpoint.spec.group_size)
                    == variant["config"]["quantization"]["quant_algo"]
                )
                assert checkpoint.quantized == bool(variant["args"]["weight_only"])


@pytest.mark.parametrize("name", ["bf16", "int8_wo_fp16", "int4_wo_bf16"])
def test_where_tensors_are_cut_into_pieces_does_not_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden models are smaller than a piece; a full-size one has thousands."""
    whole = _convert(VARIANTS[name]["args"], tmp_path / "whole")
    monkeypatch.setattr("minitron_build.checkpoint.values._PIECE_ELEMENTS", 1000)
    monkeypatch.setattr("minitron_build.checkpoint.write._BLOCK_ELEMENTS", 5000)
    cut = _convert(VARIANTS[name]["args"], tmp_path / "cut")
    assert (cut / "rank0.safetensors").read_bytes() == (whole / "rank0.safetensors").read_bytes()
