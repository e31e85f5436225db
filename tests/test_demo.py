"""``minitron demo``: every command by name, in order, skipped when up to date, and nothing left, interrupted or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gguf_files
from conftest import ROOMS, ROOT, SMALL_MODEL, minitron
from minitron.artifacts import manifest
from minitron_cli.commands import demo

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def first_run(output: Path) -> subprocess.CompletedProcess[str]:
    return minitron("demo", "--model", SMALL_MODEL, "--output", output, "--prompt", "And the")


def ours(output: Path) -> list[str]:
    """Living processes that have the demo's folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                words = (entry / "cmdline").read_bytes()
                if str(output).encode() in words:
                    found.append(words.replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return found


def marks(output: Path) -> set[str]:
    """Of the demo's server, while there is one: the names of the folders with their state."""
    servers = output / "servers"
    return set(os.listdir(servers)) if servers.exists() else set()


def commands(stdout: str) -> list[str]:
    return re.findall(r"^\$ minitron (repo \w+|\w+)", stdout, re.MULTILINE)


def wait_for(running: subprocess.Popen[str], command: str) -> str:
    """Read on until the demo shows the command; returns what it said up to there."""
    assert running.stdout is not None
    said = ""
    for line in running.stdout:
        said += line
        if line.startswith(f"$ minitron {command}"):
            return said
    raise AssertionError(f"no 'minitron {command}' in:\n{said}")


def test_the_whole_way(output: Path, first_run: subprocess.CompletedProcess[str]) -> None:
    assert commands(first_run.stdout) == [
        "convert", "build", "render", "check", "serve", "generate", "bench", "stop"]  # fmt: skip
    assert len(answer(first_run.stdout).split()) > 10
    figures = first_run.stdout.partition("$ minitron bench")[2]
    for metric in ("TTFT", "ITL", "TPOT", "E2E", "tokens/s"):
        assert metric in figures
    assert "a100-80gb" in first_run.stdout
    assert ours(output) == []


@pytest.mark.slow
def test_a_gguf_file_goes_the_whole_way_and_says_the_same(
    first_run: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """A BF16 file holds the same weights; a second run finds the stages made of it up to date."""
    model = gguf_files.write_model(SMALL_MODEL, tmp_path, "BF16")
    words: list[str | Path] = ["demo", "--model", model, "--output", tmp_path / "out", "--prompt", "And the"]
    found = minitron(*words)
    assert commands(found.stdout) == commands(first_run.stdout)
    assert answer(found.stdout) == answer(first_run.stdout)
    assert minitron(*words).stdout.count("(up to date, skipped)") == 3
    assert ours(tmp_path) == []


def answer(stdout: str) -> str:
    return stdout.partition("$ minitron generate")[2].partition("\n")[2].partition("$ minitron bench")[0]


def test_a_stage_that_fails_ends_it_with_its_code(tmp_path: Path) -> None:
    done = minitron("demo", "--model", tmp_path / "nowhere", "--output", tmp_path / "out", check=False)
    assert done.returncode == 3
    assert done.stderr.count("minitron: error:") == 1
    assert commands(done.stdout) == ["convert"]


def test_two_demos_in_one_folder_are_refused(interrupted: subprocess.Popen[str], output: Path) -> None:
    wait_for(interrupted, "convert")
    done = minitron("demo", "--model", SMALL_MODEL, "--output", output, check=False)
    assert done.returncode == 2
    assert "another demo" in done.stderr


@pytest.fixture
def interrupted(output: Path, first_run: object) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process group of its own, as a terminal gives it; it is ended whatever a test does."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    words: list[str | Path] = ["demo", "--model", str(SMALL_MODEL), "--output", str(output)]
    child = subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", *words], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": rooms},
    )  # fmt: skip
    yield child
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=300)


@pytest.mark.parametrize("moment", ["convert", "serve", "bench"])
def test_ctrl_c_leaves_nothing(interrupted: subprocess.Popen[str], output: Path, moment: str) -> None:
    earlier = wait_for(interrupted, moment)
    assert earlier.count("(up to date, skipped)") == (0 if moment == "convert" else 3)
    deadline = time.monotonic() + 300
    while moment != "convert" and not marks(output) and time.monotonic() < deadline:
        time.sleep(0.02)  # until the server of this demo has begun
    seen = marks(output)
    assert len(seen) == (0 if moment == "convert" else 1)
    os.killpg(interrupted.pid, signal.SIGINT)
    said, _ = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130, said
    deadline = time.monotonic() + 60
    while ours(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ours(output) == []
    assert not [name for name in os.listdir("/dev/shm") if any(mark in name for mark in seen)]
    assert marks(output) == set()


def test_a_reader_that_leaves_leaves_nothing_behind(output: Path, first_run: object) -> None:
    """As in ``minitron demo | head``: the server is stopped although nothing can be printed any more."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    words: list[str | Path] = ["demo", "--model", str(SMALL_MODEL), "--output", str(output)]
    with subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", *words], text=True, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": rooms},
    ) as child:  # fmt: skip
        wait_for(child, "generate")
        assert child.stdout is not None
        child.stdout.close()
        child.wait(300)
    assert ours(output) == []
    assert marks(output) == set()


def test_what_is_not_up_to_date(output: Path, first_run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, engine, repository = (output / name for name in ("checkpoint", "engine", "repository"))
    arguments = {"target": "cpu", "execution": "exact"}
    assert demo._is_up_to_date("engine", engine, checkpoint, arguments)
    assert demo._is_up_to_date("checkpoint", checkpoint, SMALL_MODEL, {"precision": "auto"})
    assert demo._is_up_to_date("repository", repository, engine, {})
    # Other arguments, another input, not there.
    assert not demo._is_up_to_date("engine", engine, checkpoint, arguments | {"execution": "fast"})
    assert not demo._is_up_to_date("checkpoint", checkpoint, SMALL_MODEL.parent, {})
    assert not demo._is_up_to_date("repository", repository, checkpoint, {})
    assert not demo._is_up_to_date("engine", output / "nowhere", checkpoint, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", "9.9.9")
        assert not demo._is_up_to_date("engine", engine, checkpoint, arguments)
    moved = repository.rename(output / "moved")  # its configs name the place where it was rendered
    assert not demo._is_up_to_date("repository", moved, engine, {})
    moved.rename(repository)
    (engine / "openvino" / "openvino_model.xml").touch()
    assert not demo._is_up_to_date("engine", engine, checkpoint, arguments)
