"""What "auto" means for a model's weights and activations, by every stage that resolves it.

Expected types are the rule of TensorRT-LLM's converter (``infer_dtype`` of models/convert_utils.py, 1.x): the type in
config.json, and float16 for float32; where the user names one, it is that.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import random_model
from conftest import minitron_here
from minitron.model import shape as shapes

TINY = random_model.SHAPES["tiny"]
WEIGHTS_ARE_16_BITS = {
    "float32": ("float32", (), "float16"),
    "float16": ("float16", (), "float16"),
    "bfloat16": ("bfloat16", (), "bfloat16"),
    "float32, asked for": ("float32", ("--dtype", "bfloat16"), "bfloat16"),
    "bfloat16, asked for as a precision": ("bfloat16", ("--precision", "float16"), "float16"),
}


def document(*words: str | Path) -> Any:
    code, out, said = minitron_here(*words, "--json")
    assert code == 0, said
    return json.loads(out)


@pytest.mark.parametrize("case", WEIGHTS_ARE_16_BITS)
def test_convert_plan_and_the_llm_api_agree(case: str, tmp_path: Path) -> None:
    stored, asked, expected = WEIGHTS_ARE_16_BITS[case]
    model = tmp_path / "model"
    random_model.write_random_model(model, dataclasses.replace(TINY, dtype=stored))
    assert shapes.read(model / "config.json").dtype == stored

    document("convert", model, "--output", tmp_path / "checkpoint", *asked)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert (config["dtype"], config["quantization"]["quant_algo"]) == (expected, None)

    plan = document("plan", "--model", model, "--target", "a100-80gb", *asked)
    assert (plan["precision"], plan["dtype"]) == (expected, expected)

    code, _, said = minitron_here(
        "render", model, "--backend", "llmapi", "--target", "a100-80gb", "--output", tmp_path / "repository", *asked
    )
    assert code == 0, said
    arguments = yaml.safe_load((tmp_path / "repository" / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert arguments["dtype"] == expected
