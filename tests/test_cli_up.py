"""The stages of a recipe brought up to date: commands complete and in order, and nothing done twice.

docker and trtllm-build are played by the programs in doubles/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL, minitron, minitron_here, outside_make
from minitron import recipe
from minitron.artifacts import manifest
from minitron.artifacts.verify import verify
from minitron.version import VERSION


def commands(text: str) -> list[str]:
    """What was run or would be, by its first words, without what was left alone."""
    text = re.sub(r"^\$ minitron .*\n\(up to date, skipped\)$", "", text, flags=re.MULTILINE)
    return re.findall(r"^(?:\$ )?(?:minitron|docker|trtllm-build) (\w+)", text, re.MULTILINE)


STAGES = ["convert", "build", "render", "check"]


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_dry_run_prints_the_whole_way_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``make a100`` has it; what it prints by itself ends in the command that shows how the server is started."""
    out = tmp_path / "out"
    outside_make(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / room) for room in ROOMS))
    variables = [f"MINITRON={sys.executable} -m minitron_cli", f"OUT={out}", f"RECIPE={name}", f"MODEL={SMALL_MODEL}"]
    done = subprocess.run(["make", "--assume-old=.venv/.ready", "a100", "DRY_RUN=1", *variables], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace(f"{sys.executable} -m minitron_cli", "minitron")
    found = commands(text)
    wanted = ["render", "check"] if name == "a100-llmapi" else STAGES
    if name not in ("a100-llmapi", "cpu"):
        wanted = [*STAGES[:2], "run", *STAGES[2:]]
    assert found == ["plan", *wanted, "serve"]
    assert not out.exists()
    if "run" in wanted:
        docker = next(line for line in text.splitlines() if line.startswith("docker run"))
        assert f"{out}/checkpoint:/checkpoint:ro" in docker
        assert "--max_batch_size" in docker
    assert "${" not in text and "None" not in text


def up(folder: Path, *more: str, model: Path = SMALL_MODEL) -> tuple[str | Path, ...]:
    """The words of an ``up`` there."""
    return ("up", "--output", folder / "out", "--recipe", "a100-int8", "--model", model, *more)


@pytest.mark.slow
def test_the_whole_way_runs_once(doubles: Path) -> None:
    words = up(doubles, "--container")
    first = minitron(*words)
    assert commands(first.stdout) == STAGES
    repository = doubles / "out" / "repository"
    assert all(finding.level == "ok" for finding in verify(repository))
    before = {stage: manifest.read(doubles / "out" / stage, stage) for stage in ("checkpoint", "engine", "repository")}
    again = minitron(*words)
    assert [name for name in commands(again.stdout) if name in ("convert", "render")] == []
    assert "is there already and is what was asked for" in again.stdout
    assert {stage: manifest.read(doubles / "out" / stage, stage) for stage in before} == before


@pytest.mark.slow
def test_another_recipe_value_makes_what_depends_on_it(doubles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = up(doubles)
    minitron(*words)
    monkeypatch.setenv("MINITRON_RECIPE_WORKLOAD_CONCURRENCY", "3")
    changed = commands(minitron(*words).stdout)
    assert changed == ["build", "render", "check"]
    assert manifest.read(doubles / "out" / "engine", "engine").details["limits"]["max_batch_size"] == 3
    monkeypatch.setenv("MINITRON_RECIPE_PRECISION", "int4_weight_only")
    assert commands(minitron(*words).stdout) == STAGES


@pytest.mark.slow
def test_what_another_version_made_is_made_again(doubles: Path) -> None:
    """But the TensorRT engine, which trtllm-build made, in an hour perhaps."""
    words = up(doubles)
    minitron(*words)
    for stage in ("checkpoint", "engine", "repository"):
        path = doubles / "out" / stage / manifest.NAME
        path.write_text(path.read_text().replace(f'"toolkit": "{VERSION}"', '"toolkit": "0.0.9"'))
    again = minitron(*words).stdout
    assert commands(again) == STAGES
    assert "is there already and is what was asked for" in again


def test_a_changed_model_is_converted_again(doubles: Path) -> None:
    model = doubles / "model"
    shutil.copytree(SMALL_MODEL, model)
    words = up(doubles, "--until", "convert", model=model)
    assert commands(minitron(*words).stdout) == ["convert"]
    assert commands(minitron(*words).stdout) == []
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert commands(minitron(*words).stdout) == ["convert"]


def test_a_stage_that_fails_ends_the_way(doubles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE", "fail")
    done = minitron(*up(doubles), check=False)
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


@pytest.mark.parametrize(
    ("target", "ending"),
    [("convert", "--until convert"), ("build", "--until build"), ("repo", "--dry-run")],
)
def test_make_hands_recipe_and_model_on(target: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed by make, not run: a virtual environment that looks ready is all that make asks for."""
    outside_make(monkeypatch)
    done = subprocess.run(
        ["make", "-n", "--assume-old=.venv/.ready", target, "RECIPE=a100-int4", "MODEL=/models/some", "DRY_RUN=1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    last = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "up --output out/a100-int4-some --recipe a100-int4 --model /models/some --dry-run" in last
    assert last.endswith(ending)


def test_without_a_checkout_it_says_where_to_get_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron_cli.commands import up as command

    monkeypatch.setattr(command, "_CHECKOUT", tmp_path)  # as installed from a wheel
    monkeypatch.chdir(tmp_path)
    code, _, said = minitron_here("up")
    assert code == 2 and said.count("\n") == 1
    assert "give --model, a Hugging Face folder or id such as nvidia/Minitron-4B-Base, or a GGUF file" in said
    # A recipe names its model: the default one.
    code, out, _ = minitron_here("up", "--recipe", "cpu", "--dry-run")
    assert (
        code == 0 and "$ minitron convert nvidia/Minitron-4B-Base --output out/cpu-Minitron-4B-Base/checkpoint" in out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--until", "build", "--serve"), "--until build ends before there is anything to serve"),
        (("--demo", "--serve"), "give one of them"),
    ],
)
def test_what_cannot_go_together_is_refused(words: tuple[str, ...], said: str) -> None:
    code, _, error = minitron_here("up", "--model", SMALL_MODEL, *words)
    assert code == 2 and said in error


@pytest.mark.server
@pytest.mark.slow
def test_with_serve_it_ends_with_a_ready_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    minitron("up", "--output", tmp_path / "out", "--model", SMALL_MODEL, "--serve", "--detach", *ports)
    try:
        (server,) = json.loads(minitron("status", "--json").stdout)
        assert (server["phase"], server["repository"]) == ("ready", str(tmp_path / "out" / "repository"))
        assert minitron("generate", "And the", "--max-tokens", "4", "--url", server["urls"]["grpc"]).stdout.strip()
    finally:
        minitron("stop", tmp_path / "out" / "repository")
