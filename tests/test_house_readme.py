"""The README's commands are run as they stand there, save those that it marks as needing an A100."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, outside_make

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = "<!-- not run: "


def blocks() -> list[tuple[str, bool]]:
    """Shell blocks of the README, and whether they are marked as not to be run."""
    found = re.findall(rf"(?:({re.escape(NOT_RUN)}[^\n]*)\n)?```sh\n(.*?)```", README, re.DOTALL)
    return [(text, bool(mark)) for mark, text in found]


def test_only_what_needs_a_gpu_is_left_out() -> None:
    left_out = [text for text, marked in blocks() if marked]
    assert len(blocks()) - len(left_out) >= 2
    assert all("a100" in text for text in left_out)
    assert "make test" in README


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git knows, with this environment as its .venv, so that nothing is installed twice."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    for name in (".ready", ".ready-dev"):
        (tmp_path / ".venv" / name).touch()  # newer than pyproject.toml: `make setup` finds its work done
    return tmp_path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def on_free_ports(script: str) -> str:
    """The same commands on other ports than Triton's own, so that two checkouts can be tested side by side."""
    grpc, http, metrics = free_ports(3)
    ports = f" --grpc-port {grpc} --http-port {http} --metrics-port {metrics}"
    script = re.sub(r"^(minitron serve .*)$", rf"\1{ports}", script, flags=re.MULTILINE)
    return re.sub(r"^(minitron (?:generate|bench)\b.*)$", rf"\1 --url 127.0.0.1:{grpc}", script, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.server
def test_the_commands_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside_make(monkeypatch)
    script = on_free_ports("".join(text for text, marked in blocks() if not marked))
    assert "make demo" in script
    env = os.environ | {
        "XDG_STATE_HOME": str(checkout / "state"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-exc", script], cwd=checkout, env=env, capture_output=True, text=True, timeout=900,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Installing" not in done.stdout
    assert "TTFT" in done.stdout
    assert not list((checkout / "out" / "repository").glob("*.partial-*"))
