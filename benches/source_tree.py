"""The toolkit of a source tree, this one's or that of another commit, as a command over the packages that are here.

The environment of another commit is its own folders in front of the path of Python; third-party packages are those of
the environment that runs the bench, so that what is compared is the toolkit alone.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_ROOMS = ("core", "build", "model_repo", "clients", "cli")


def commit(ref: str) -> str:
    """The commit, forty digits, that ``ref`` names in this checkout; SystemExit where it names none."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{ref} is no commit of {ROOT}: give --base a commit, branch or tag that 'git log' knows")
    return done.stdout.strip()


def checked_out(ref: str, folder: Path) -> Path:
    """The files of a commit in ``folder``, written once."""
    if not folder.exists():
        done = subprocess.run(["git", "-C", ROOT, "archive", commit(ref)], check=True, capture_output=True)
        partial = folder.with_name(folder.name + ".partial")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(folder)
    return folder


def is_old(tree: Path) -> bool:
    """Whether it is of version 0.2 or before, whose command line was another."""
    return not (tree / "cli").exists()


def command(tree: Path, *words: object) -> tuple[list[str], dict[str, str]]:
    """``minitron WORDS`` of that tree, WORDS as this version spells them: argv and environment."""
    spoken = list(map(str, words))
    module = "minitron_cli"
    if is_old(tree):
        module = "minitron_trtllm.cli"
        # Its queue limit was Triton's own, which holds requests that come together; its benches took it off.
        spoken = ["repo", *spoken, "--max-queue-size", "0"] if spoken[0] == "render" else spoken
    rooms = os.pathsep.join(str(tree / room) for room in _ROOMS)
    return [sys.executable, "-m", module, *spoken], os.environ | {"PYTHONPATH": rooms}


def run(tree: Path, *words: object, **environment: str) -> Any:
    """Run the command to its end; its JSON document where WORDS ask for one."""
    argv, own = command(tree, *words)
    done = subprocess.run(argv, env=own | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if "--json" in words else None


@contextmanager
def running(tree: Path, *words: object, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command as a child that ends at SIGTERM; what it prints can be read, its stderr goes into ``log``."""
    argv, environment = command(tree, *words)
    with open(log or os.devnull, "w", encoding="utf-8") as told:
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=told if log else None, text=True
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def document(process: subprocess.Popen[str], log: Path | None = None) -> dict[str, Any]:
    """What the command prints in JSON when it is ready; AssertionError, with the end of ``log``, if it ends first."""
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, f"{process.args!r} did not start:\n{log.read_text(encoding='utf-8')[-2000:] if log else ''}"
        text += line
    found: dict[str, Any] = json.loads(text)
    return found
