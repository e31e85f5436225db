"""What ModelOpt was asked for: the model, the cases and the factors of ``make_modelopt_fixtures.py`` and its tests."""

from __future__ import annotations

import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import random_model
from minitron.model.shape import ModelShape

SHAPE = ModelShape(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2,
    max_positions=64, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False, dtype="bfloat16",
)  # fmt: skip
PROMPT = [5, 17, 99, 3, 64, 120, 41, 41, 8, 77, 2, 33]

#: Case and tp. ``given``: our own factors, groups of 128 and of 64.
CASES = (
    ("int4_awq", 1), ("int4_awq_64", 2), ("given_128", 1), ("given_64", 1), ("given_64", 2), ("int4_blockwise", 1),
    ("int8_wo", 1), ("fp8", 1), ("fp8", 2), ("int8_sq", 1), ("int8_sq", 2), ("w4a8_awq", 1), ("bf16_int8_kv", 1),
)  # fmt: skip
CONFIGS = {
    "int4_awq": "INT4_AWQ_CFG", "int4_awq_64": "INT4_AWQ_CFG", "int4_blockwise": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG", "fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}  # fmt: skip
GROUPS = {"int4_awq_64": 64, "given_64": 64}
KEPT = ("int4_awq", "given_128", "given_64", "int4_blockwise")


def write_model(folder: Path) -> Path:
    """The model of all cases, as a Hugging Face folder."""
    random_model.write_random_model(folder, SHAPE, seed=22, tokenizer=False)
    return folder


def calibration_ids() -> NDArray[np.int64]:
    """Token ids [sequences, tokens] that ModelOpt calibrates with."""
    return np.random.default_rng(22).integers(4, SHAPE.vocab_size, (8, 48))


def factors(name: str, size: int) -> NDArray[np.float32]:
    """Pre-quant scales between 1/2 and 2 that bfloat16 holds, the same for modules that share their input."""
    place = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
    drawn = np.random.default_rng(zlib.crc32(place.encode())).uniform(-1, 1, size)
    return (2.0**drawn).astype(ml_dtypes.bfloat16).astype(np.float32)
