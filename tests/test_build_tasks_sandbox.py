"""Programs that a model writes: what they may not do in bubblewrap, and that nothing runs where there is no sandbox."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron.errors import MissingDependency
from minitron_build.evaluate.tasks import sandbox


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    sandbox.sandbox.cache_clear()
    yield
    sandbox.sandbox.cache_clear()


def works() -> bool:
    """Bubblewrap is here and this machine lets it make namespaces."""
    if shutil.which("bwrap") is None:
        return False
    return subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], check=False).returncode == 0


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither kind; and a bubblewrap that is there but may not do its work."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="bubblewrap"):
        sandbox.passes("pass")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(MissingDependency, match="neither works here"):
        sandbox.passes("pass")


def test_a_container_is_taken_where_bubblewrap_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A docker that runs what follows the image's name, and notes what it was asked."""
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nwhile [ "$1" != python ]; do shift; done\n'
                      'shift\nexec /usr/bin/env -i "$PYTHON" "$@"\n'.replace("$PYTHON", sys.executable))  # fmt: skip
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox.passes("assert sorted([2, 1]) == [1, 2]")
    assert not sandbox.passes("assert False")
    assert not sandbox.passes("raise SystemExit(0)\nassert False")  # leaving early is no pass
    asked = (tmp_path / "asked").read_text()
    for words in ("--network none", "--read-only", "--memory 1g", "--cap-drop ALL", sandbox.IMAGE):
        assert words in asked


@pytest.mark.skipif(not works(), reason="needs bubblewrap, and namespaces allowed")
def test_a_program_in_bubblewrap_sees_nothing_and_reaches_nobody(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert sandbox.passes("import math\nassert math.gcd(4, 6) == 2")
    assert not sandbox.passes("assert 1 == 2")
    assert not sandbox.passes(f"open({str(secret)!r})")
    assert not sandbox.passes("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)")
    assert not sandbox.passes("open('/usr/written', 'w')")
    assert not sandbox.passes("bytearray(2 << 30)")
