"""The drills of CONTRIBUTING: what is added touches a few files of the product, the ones that stand here.

Each is done in a copy of the rooms and seen by a user's command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL

#: File, what stands there, and what takes its place.
Change = tuple[str, str, str]
MOST_FILES = 3

RECIPE_FIELD: list[Change] = [
    ("core/minitron/recipe_model.py", "class Serving(_Section):\n", "class Serving(_Section):\n"
     '    greeting: str = _field("hello", "what is said first")\n\n'),
]  # fmt: skip
METRIC: list[Change] = [
    ("clients/minitron_gateway/metrics.py", "        self.broken = Counter(",
     '        self.polite = Counter(name + "polite_requests", "Requests that said please", registry=own)\n'
     "        self.broken = Counter("),
    ("clients/minitron_gateway/app.py", "            counted.left.inc()", "            counted.polite.inc()\n"
     "            counted.left.inc()"),
]  # fmt: skip
CHECK: list[Change] = [
    ("core/minitron/data/acceptance.yaml", "checkpoint.loads:\n", 'checkpoint.named:\n  step: checkpoint\n'
     '  question: "the folder has a name"\n  remedy: "give it one"\ncheckpoint.loads:\n'),
    ("build/minitron_build/probe/checkpoint.py", 'return [judge("checkpoint.whole", problems, found[0].message)]',
     'return [judge("checkpoint.whole", problems, found[0].message), judge("checkpoint.named", [], folder.name)]'),
]  # fmt: skip
PRECISION: list[Change] = [
    ("core/minitron/model/precision.py", '    INT8_WEIGHT_ONLY = "int8_weight_only"\n',
     '    INT8_WEIGHT_ONLY = "int8_weight_only"\n    W8A16 = "w8a16"\n'),
    ("core/minitron/model/precision.py", 'return {"int8_weight_only": 8,',
     'return {"w8a16": 8, "int8_weight_only": 8,'),
    ("core/minitron/model/precision.py", "in (Precision.INT8_WEIGHT_ONLY,",
     "in (Precision.W8A16, Precision.INT8_WEIGHT_ONLY,"),
    ("core/minitron/model/precision.py", 'return {"int8_weight_only": "W8A16",',
     'return {"w8a16": "W8A16", "int8_weight_only": "W8A16",'),
    ("core/minitron/model/precision.py", "ROUNDED = (", "ROUNDED = (Precision.W8A16, "),
    ("core/minitron/recipe_model.py", '"int8_weight_only",', '"w8a16", "int8_weight_only",'),
]  # fmt: skip

Run = Callable[..., str]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[list[Change]], Run]:
    """``copy(changes)``: the rooms with them, and a way to run Python there."""

    def make(changes: list[Change]) -> Run:
        assert len({file for file, _, _ in changes}) <= MOST_FILES
        for room in ROOMS:
            shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in changes:
            text = (tmp_path / file).read_text(encoding="utf-8")
            assert old in text, (file, old)
            (tmp_path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        paths = os.pathsep.join(str(tmp_path / room) for room in ROOMS)

        def run(*words: str | Path, **variables: str) -> str:
            environment = os.environ | {"PYTHONPATH": paths} | variables
            return subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, text=True,
                                  stdout=subprocess.PIPE).stdout  # fmt: skip

        return run

    return make


def test_a_recipe_field(copy: Callable[[list[Change]], Run]) -> None:
    """It is in recipes, environment and the plan's flags at once."""
    run = copy(RECIPE_FIELD)
    plan = ("-m", "minitron_cli", "plan", "--show-recipe", "--json")
    assert json.loads(run(*plan))["values"]["serving"]["greeting"] == "hello"
    assert json.loads(run(*plan, "--greeting", "hi"))["values"]["serving"]["greeting"] == "hi"
    told = json.loads(run(*plan, MINITRON_RECIPE_SERVING_GREETING="good day"))
    assert told["values"]["serving"]["greeting"] == "good day"


def test_a_metric(copy: Callable[[list[Change]], Run]) -> None:
    run = copy(METRIC)
    code = "from minitron_gateway import app, metrics; m = metrics.Metrics(); m.polite.inc(); print(m.text().decode())"
    assert "minitron_gateway_polite_requests_total 1.0" in run("-c", code)


def test_a_check(copy: Callable[[list[Change]], Run], small_checkpoint: Callable[[str], Path]) -> None:
    """It is in the acceptance, with its question and remedy, and can be asked for alone."""
    run, folder = copy(CHECK), small_checkpoint("int8_weight_only")
    said = run("-m", "minitron_cli", "accept", folder, "--only", "checkpoint.named")
    assert "checkpoint.named" in said and folder.name in said


def test_a_name_of_a_precision(
    copy: Callable[[list[Change]], Run], small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another name for int8: the same bytes."""
    run, other = copy(PRECISION), small_checkpoint("int8_weight_only")
    run("-m", "minitron_cli", "convert", SMALL_MODEL, "--precision", "w8a16", "--output", tmp_path / "made")
    assert (tmp_path / "made" / "rank0.safetensors").read_bytes() == (other / "rank0.safetensors").read_bytes()
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization"]["quant_algo"] == "W8A16"
    # A plan has a line of it, and offers it where 16 bits do not fit; a GPU of another layout of codes gets floats.
    plan = run("-m", "minitron_cli", "plan", "--recipe", "a100-int8", "--precision", "w8a16")
    assert [line.split()[0] for line in plan.splitlines() if "w8a16 <" in line] == ["w8a16"]
    small = ("--recipe", "a100-float16", "--target", "a100-40gb", "--concurrency", "110")
    assert "precision w8a16" in run("-m", "minitron_cli", "plan", *small)
    run(
        "-m",
        "minitron_cli",
        "convert",
        SMALL_MODEL,
        "--precision",
        "w8a16",
        "--target",
        "h100-80gb",
        "--output",
        tmp_path / "left",
    )
    left = json.loads((tmp_path / "left" / "manifest.json").read_text())["details"]
    assert left["quantize_at_build"] is True
