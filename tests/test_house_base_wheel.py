"""``pip install .`` alone gives converting, planning, rendering and the client, and nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SMALL_MODEL

pytestmark = pytest.mark.slow

HEAVY = ("nvidia-pytriton", "openvino", "openvino-genai", "torch", "transformers", "tensorrt-llm")


@pytest.fixture(scope="module")
def clean_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with nothing but this project's base wheel and what it asks for."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", ROOT], check=True)
    return venv / "bin"


def run(clean_bin: Path, *words: str | Path) -> str:
    """Run a program of that environment, away from the checkout and without this one's settings."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([clean_bin / words[0], *map(str, words[1:])], cwd=clean_bin, env=env, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_comes_along(clean_bin: Path) -> None:
    installed = {line.split("==")[0].lower().replace("_", "-") for line in run(clean_bin, "pip", "freeze").splitlines()}
    assert "tritonclient" in installed
    assert not installed & set(HEAVY)


def test_the_client_can_be_imported(clean_bin: Path) -> None:
    assert run(clean_bin, "python", "-c", "from minitron_client import Client; print(Client.__name__)") == "Client\n"


def test_it_converts(clean_bin: Path, tmp_path: Path) -> None:
    run(clean_bin, "minitron", "convert", SMALL_MODEL, "--output", tmp_path / "checkpoint", "--precision", "bfloat16")
    assert (tmp_path / "checkpoint" / "rank0.safetensors").stat().st_size > 0


def test_every_command_explains_itself(clean_bin: Path) -> None:
    """Asking for help must not need what only running the command needs."""
    names = run(clean_bin, "python", "-c", "from minitron_cli.main import COMMANDS; print(*COMMANDS)").split()
    for name in names:
        assert f"minitron {name}" in run(clean_bin, "minitron", name, "--help")
