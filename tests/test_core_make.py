"""The stages of a recipe brought up to date: commands complete and in order, and nothing done twice.

docker and trtllm-build are played by the programs in doubles/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, SMALL_MODEL, minitron, outside_make
from minitron import recipe
from minitron.artifacts import manifest
from minitron.artifacts.verify import verify
from minitron.version import VERSION


def commands(text: str) -> list[str]:
    """What was run, by its first two words."""
    lines = [line for line in text.splitlines() if line.startswith(("minitron ", "docker run", "trtllm-build"))]
    return [" ".join(line.split()[1:3] if " repo " in line else line.split()[1:2]) for line in lines]


WHOLE_WAY = ["plan", "convert", "build", "render", "check", "serve"]


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_dry_run_prints_the_whole_way_in_order(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = minitron("make", "a100", "--directory", out, "--recipe", name, "--model", SMALL_MODEL, "--dry-run").stdout
    found = commands(text)
    wanted = {"a100-llmapi": ["plan", "render", "check", "serve"], "cpu": WHOLE_WAY}.get(
        name, [*WHOLE_WAY[:3], "run", *WHOLE_WAY[3:]]
    )
    assert found == wanted
    assert not out.exists()
    if "run" in wanted:
        docker = next(line for line in text.splitlines() if line.startswith("docker run"))
        assert f"{out}/checkpoint:/checkpoint:ro" in docker
        assert "--max_batch_size" in docker
    assert "${" not in text and "None" not in text


@pytest.mark.slow
def test_the_whole_way_runs_once(doubles: Path) -> None:
    words = ("make", "a100", "--directory", doubles / "out", "--recipe", "a100-int8", "--model", SMALL_MODEL)
    first = minitron(*words)
    assert commands(first.stdout) == WHOLE_WAY + commands(first.stdout)[len(WHOLE_WAY) :]
    repository = doubles / "out" / "repository"
    assert all(finding.level == "ok" for finding in verify(repository))
    before = {stage: manifest.read(doubles / "out" / stage, stage) for stage in ("checkpoint", "engine", "repository")}
    again = minitron(*words)
    assert [name for name in commands(again.stdout) if name in ("convert", "render")] == []
    assert "is there already and is what was asked for" in again.stdout
    assert {stage: manifest.read(doubles / "out" / stage, stage) for stage in before} == before


@pytest.mark.slow
def test_another_recipe_value_makes_what_depends_on_it(doubles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("make", "repo", "--directory", doubles / "out", "--recipe", "a100-int8", "--model", SMALL_MODEL)
    minitron(*words)
    monkeypatch.setenv("MINITRON_RECIPE_WORKLOAD_CONCURRENCY", "3")
    changed = commands(minitron(*words).stdout)
    assert changed == ["build", "render"]
    assert manifest.read(doubles / "out" / "engine", "engine").details["limits"]["max_batch_size"] == 3
    monkeypatch.setenv("MINITRON_RECIPE_PRECISION", "int4_weight_only")
    assert commands(minitron(*words).stdout) == ["convert", "build", "render"]


@pytest.mark.slow
def test_what_another_version_made_is_made_again(doubles: Path) -> None:
    """But the TensorRT engine, which trtllm-build made, in an hour perhaps."""
    words = ("make", "repo", "--directory", doubles / "out", "--recipe", "a100-int8", "--model", SMALL_MODEL)
    minitron(*words)
    for stage in ("checkpoint", "engine", "repository"):
        path = doubles / "out" / stage / manifest.NAME
        path.write_text(path.read_text().replace(f'"toolkit": "{VERSION}"', '"toolkit": "0.0.9"'))
    again = minitron(*words).stdout
    assert commands(again) == ["convert", "build", "render"]
    assert "is there already and is what was asked for" in again


def test_a_changed_model_is_converted_again(doubles: Path) -> None:
    model = doubles / "model"
    shutil.copytree(SMALL_MODEL, model)
    words = ("make", "convert", "--directory", doubles / "out", "--recipe", "a100-int8", "--model", model)
    assert commands(minitron(*words).stdout) == ["convert"]
    assert commands(minitron(*words).stdout) == []
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert commands(minitron(*words).stdout) == ["convert"]


def test_a_stage_that_fails_ends_the_way(doubles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE", "fail")
    done = minitron("make", "a100", "--directory", doubles / "out", "--recipe", "a100-int8", "--model", SMALL_MODEL,
                    check=False)  # fmt: skip
    assert done.returncode == 6
    assert commands(done.stdout)[-1] == "build"
    assert not (doubles / "out" / "engine").exists()


TARGETS = {
    "plan", "convert", "build", "engine", "repo", "serve", "status", "stop", "generate", "latency", "load", "report",
    "inspect", "doctor", "verify", "a100", "demo", "test",
}  # fmt: skip


def test_every_target_of_the_front_door_is_phony() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = {name for line in re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE) for name in line.split()}
    assert phony >= TARGETS


@pytest.mark.parametrize("target", ["build", "a100", "repo"])
def test_make_hands_recipe_and_model_on(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed by make, not run: a virtual environment that looks ready is all that make asks for."""
    outside_make(monkeypatch)
    done = subprocess.run(
        ["make", "-n", "--assume-old=.venv/.ready", target, "RECIPE=a100-int4", "MODEL=/models/some", "DRY_RUN=1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    last = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "make --directory out/a100-int4-some --recipe a100-int4 --model /models/some --dry-run" in last
    assert last.endswith(target)
