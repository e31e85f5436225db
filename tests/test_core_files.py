"""Folders appear whole or not at all. Expected behaviour: the docstrings of ``files`` (POSIX rename, flock)."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from minitron import files
from minitron.errors import NoSpace, OutputError, OutputExists


def test_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with files.new_folder(target) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["a"]
    assert [p.name for p in target.parent.iterdir()] == ["result"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "result") as folder:
        (folder / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "old").write_text("x")
    with pytest.raises(OutputExists, match="--force"), files.new_folder(tmp_path / "result"):
        pytest.fail("the block must not run")
    assert (tmp_path / "result" / "old").exists()


@pytest.mark.parametrize("fails", [True, False])
def test_force_replaces_only_on_success(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "old").write_text("x")
    try:
        with files.new_folder(tmp_path / "result", force=True) as folder:
            (folder / "new").write_text("y")
            assert (tmp_path / "result" / "old").exists()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [p.name for p in (tmp_path / "result").iterdir()] == ["old" if fails else "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_too_little_space_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="free"), files.new_folder(tmp_path / "result", needed_bytes=1 << 60):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"), files.new_folder(tmp_path / "file" / "result"):
        pytest.fail("the block must not run")


def test_a_killed_run_leaves_no_result_and_its_rest_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from minitron import files\n"
        "with files.new_folder(pathlib.Path(sys.argv[1])) as f:\n"
        "    (f / 'a').write_text('x'); print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "result"], stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(ROOT / "core")})  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    with files.new_folder(tmp_path / "result"):  # a living run's folder is left alone
        assert len(list(tmp_path.glob(".result.partial-*"))) == 2
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert len(list(tmp_path.glob(".result.partial-*"))) == 1
    with files.new_folder(tmp_path / "result", force=True) as folder:
        assert [folder] == list(tmp_path.glob(".result.partial-*"))


def test_whatever_step_a_run_is_killed_at_the_next_one_cleans_up(tmp_path: Path) -> None:
    """Killed at its first step that Python's audit events tell of (PEP 578: mkdir, open, rename …), its second, …"""
    code = (
        "import itertools, os, pathlib, signal, sys; from minitron import files\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "def make():\n"
        "    with files.new_folder(path, force=True) as f: (f / 'a').write_text('x')\n"
        "for killed in itertools.count(1):\n"
        "    if not (pid := os.fork()):\n"
        "        left = iter(range(killed - 1))\n"
        "        sys.addaudithook(lambda *_: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))\n"
        "        make()\n"
        "        os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1] == 0: break\n"
        "    make()\n"
        "    assert os.listdir(path.parent) == [path.name], (killed, os.listdir(path.parent))\n"
        "print(killed)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "work" / "result")]
    core = os.environ | {"PYTHONPATH": str(ROOT / "core")}
    done = subprocess.run(words, env=core, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # that many steps were tried


def test_a_folder_that_is_taken_for_a_dead_run_s_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock another run may remove it."""
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_lose(**words: Any) -> str:
        made.append(make(**words))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    with files.new_folder(tmp_path / "result") as folder:
        assert [str(folder)] == made[1:]
    assert (tmp_path / "result").is_dir()


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_sha256_is_hashlibs(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "f").write_bytes(content)
    assert files.sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
