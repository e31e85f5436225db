"""``minitron probe``: what is asked of TensorRT-LLM, and what is made of its answers.

The package is played by doubles/image. That its quantising operation is the real one's is held by checkpoints that
TensorRT-LLM's own code wrote (data/golden); that ``inside.py`` speaks torch's language, by torch itself (marked
``reference``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from conftest import DATA, ROOT, SMALL_MODEL, minitron
from minitron.acceptance import FAIL, PASS
from minitron.machine import compat
from minitron_build.engines.tensorrt.flags import flags
from minitron_build.probe import inside, tool
from minitron_build.probe.checkpoint import config_problems
from minitron_build.probe.tool import HelpEntry, read_help

GOLDEN = DATA / "golden" / "trtllm_checkpoint" / "a"
IMAGE = ROOT / "tests" / "doubles" / "image"


def golden(folder: str) -> dict[str, Any]:
    """Raw tensors of a golden rank 0 by name."""
    raw = (GOLDEN / folder / "rank0.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (entry, raw[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]])
        for name, entry in header.items()
    }


def quantised_inside(tmp_path: Path, floats: str, codes: str, packages: Path) -> None:
    """Run inside.py on golden float weights; its codes and scales are the golden ones."""
    given, wanted = golden(floats), golden(codes)
    names = [name for name, (entry, _) in wanted.items() if entry["dtype"] == "I8"]
    weights, output = tmp_path / "weights", tmp_path / "output"
    weights.mkdir()
    output.mkdir()
    for name in names:
        (weights / name).write_bytes(given[name][1])
    (weights / "weights.json").write_text(json.dumps({
        "dtype": {"fp16": "float16", "bf16": "bfloat16"}[floats], "bits": 8 if "int8" in codes else 4,
        "matrices": {name: given[name][0]["shape"] for name in names},
    }))  # fmt: skip
    argv = [sys.executable, inside.__file__, "quantise", str(weights), str(output)]
    subprocess.run(argv, check=True, env=os.environ | {"PYTHONPATH": str(packages)})
    assert len(names) == 8
    for name in names:
        scales = name.removesuffix("weight") + "per_channel_scale"
        assert (output / f"{name}.codes").read_bytes() == wanted[name][1], name
        assert (output / f"{name}.scales").read_bytes() == wanted[scales][1], scales


PAIRS = [("fp16", "int8_wo_fp16"), ("bf16", "int4_wo_bf16")]


@pytest.mark.parametrize(("floats", "codes"), PAIRS)
def test_the_double_quantises_as_tensorrt_llm_did(tmp_path: Path, floats: str, codes: str) -> None:
    quantised_inside(tmp_path, floats, codes, IMAGE)


@pytest.mark.reference
@pytest.mark.parametrize(("floats", "codes"), PAIRS)
def test_with_torch_itself_the_same_comes_out(tmp_path: Path, floats: str, codes: str) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tensorrt_llm").symlink_to(IMAGE / "tensorrt_llm")  # beside the torch that is installed
    quantised_inside(tmp_path, floats, codes, packages)


def help_text(columns: int, **environment: str) -> str:
    argv = [sys.executable, str(ROOT / "tests" / "doubles" / "trtllm_build.py"), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True,
                          env=os.environ | {"COLUMNS": str(columns)} | environment)  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("columns", [80, 100000])
def test_every_flag_and_default_is_read_from_a_help_however_wide(columns: int) -> None:
    entries = read_help(help_text(columns))
    assert set(entries) == set(flags())
    shown = {name: entry.default for name, entry in entries.items()}
    silent = ("kv_cache_type", "paged_kv_cache")  # argparse.SUPPRESS in tensorrt_llm/commands/build.py
    assert all(shown[name] is None for name in silent)
    assert shown | dict.fromkeys(silent) == {
        name: None if name in silent else str(flag.default) for name, flag in flags().items()
    }
    assert entries["max_seq_len"].names == ("max_seq_len", "max_decoder_seq_len")


def test_a_help_as_upstream_prints_it() -> None:
    """Wording and form: tensorrt_llm/commands/build.py with ArgumentDefaultsHelpFormatter, 80 columns."""
    text = """usage: trtllm-build [-h] [--max_batch_size MAX_BATCH_SIZE]

options:
  -h, --help            show this help message and exit
  --max_batch_size MAX_BATCH_SIZE
                        Maximum number of requests that the engine can
                        schedule. (default: 2048)
  --strip_plan          Enable stripping weights. (default: False)

Plugin config arguments:
  --gemm_plugin {auto,float16,bfloat16,disable}
                        The GEMM plugin that utilizes NVIDIA cuBLASLt. (default:
                        None)
"""
    assert read_help(text) == {
        "max_batch_size": HelpEntry(("max_batch_size",), "2048"),
        "strip_plan": HelpEntry(("strip_plan",), "False"),
        "gemm_plugin": HelpEntry(("gemm_plugin",), "None"),
    }


def test_versions_are_held_against_the_table() -> None:
    image = compat.image("26.07-trtllm-python-py3")
    good = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48", "cuda": "13.1.0.036", "server": "2.71.0"}
    assert tool._version_problems(good, image) == []
    assert tool._version_problems(good | {"tensorrt": "10.14.1.49"}, image) == [
        "tensorrt is 10.14.1.49, and compat.yaml says 10.14.1.48"
    ]
    assert len(tool._version_problems(good | {"cuda": "13.0.2", "server": "2.70.0"}, image)) == 2
    assert tool._version_problems(good | {"server": None}, image) == []  # an image that does not say


def test_config_is_compared_key_by_key_and_additions_are_their_own() -> None:
    ours = {"dtype": "float16", "mapping": {"tp_size": 2, "pp_size": 1}, "rotary_scaling": None}
    assert config_problems(ours, ours | {"moe": {}, "mapping": {"tp_size": 2, "pp_size": 1, "cp_size": 1}}) == []
    problems = config_problems(ours, {"dtype": "bfloat16", "mapping": {"tp_size": 2}})
    assert problems == [
        "dtype is read as 'bfloat16', and 'float16' was written",
        "mapping.pp_size is not read back, and 1 was written",
        "rotary_scaling is not read back, and None was written",
    ]


def test_an_engine_whose_config_is_not_the_plan_fails(small_engine: Any, tmp_path: Path) -> None:
    import shutil

    engine = tmp_path / "engine"
    shutil.copytree(small_engine("int8_weight_only"), engine)
    done = minitron("probe", "engine", engine, "--json")
    assert [line["status"] for line in json.loads(done.stdout)["lines"]] == [PASS]
    config = json.loads((engine / "config.json").read_text())
    config["build_config"]["max_seq_len"] = 17
    (engine / "config.json").write_text(json.dumps(config))
    done = minitron("probe", "engine", engine, "--json", check=False)
    line = json.loads(done.stdout)["lines"][0]
    assert done.returncode == 8 and line["status"] == FAIL
    assert line["evidence"].startswith("max_seq_len is 17, and ")


def test_a_damaged_checkpoint_fails_its_line(small_checkpoint: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint("int8_weight_only"), folder)
    raw = bytearray((folder / "rank0.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "rank0.safetensors").write_bytes(raw)
    done = minitron("probe", "checkpoint", folder, "--files-only", check=False)
    assert done.returncode == 8 and "SHA-256 differs" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("tool",), 5, "trtllm-build is not on PATH"),
        (("tool", "--container"), 5, "docker"),
        (("checkpoint", "nowhere"), 2, "give --model"),
        (("checkpoint", "nowhere", "--model", SMALL_MODEL, "--container"), 3, "nowhere"),
        (("engine", "nowhere"), 3, "no manifest.json"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither docker nor trtllm-build
    done = minitron("probe", *words, check=False)
    assert done.returncode == code
    assert said in done.stderr and len(done.stderr.splitlines()) <= 3 and "Traceback" not in done.stderr


def test_golden_floats_are_what_they_are_taken_for() -> None:
    """The bytes that the first test hands over, read by the safetensors library."""
    with safe_open(GOLDEN / "fp16" / "rank0.safetensors", "numpy") as file:
        name = "transformer.layers.0.mlp.fc.weight"
        assert np.array_equal(np.frombuffer(golden("fp16")[name][1], np.float16), file.get_tensor(name).reshape(-1))
