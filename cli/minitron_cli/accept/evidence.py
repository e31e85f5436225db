"""The folder of an acceptance: what each step said and left, and which steps are done for which inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron import children, files, recipe
from minitron.acceptance import FAIL, Line
from minitron.errors import VerdictError
from minitron.version import VERSION

_STEPS = "steps.json"
_JUDGED = (0, VerdictError.exit_code)


@dataclass(frozen=True)
class StepFailed(Exception):
    """A command of a step ended with an exit code that is no verdict."""

    code: int
    said: str
    output: str = ""


class Evidence:
    """``folder`` holds for each step NAME.log (all it printed), NAME.json (its lines) and what else it made."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / _STEPS
        self._done: dict[str, dict[str, Any]] = {} if fresh else self._read()
        # The recipe of the acceptance is a file with every layer applied: the environment must not count twice.
        self._environment = {name: value for name, value in os.environ.items() if not _is_recipe(name)}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            loaded: dict[str, dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))
            return loaded
        except (OSError, ValueError):
            return {}

    def _known(self, step: str, inputs: Any) -> list[Line] | None:
        found = self._done.get(step)
        return [Line(**line) for line in found["lines"]] if found and found["key"] == _key(inputs) else None

    def do(self, step: str, inputs: Any, work: Callable[[], Sequence[Line]], made: Path | None = None) -> list[Line]:
        """The lines of a step, done now unless it was finished for the same inputs by the same toolkit.

        ``made`` is a file that later steps need of it: without that it is done again.

        A step that failed is not remembered: the next run tries it again. Raises what ``work`` raises.
        """
        known = self._known(step, inputs)
        if known is not None and (made is None or made.exists()):
            return known
        started = time.monotonic()
        lines = list(work())
        if any(line.status == FAIL for line in lines):
            return lines
        self._done[step] = {"key": _key(inputs), "seconds": round(time.monotonic() - started, 1),
                            "lines": [asdict(line) for line in lines]}  # fmt: skip
        files.write_text(self._path, json.dumps(self._done, indent=1) + "\n")
        return lines

    def seconds(self, step: str) -> float | None:
        """How long a finished step took."""
        found = self._done.get(step)
        return float(found["seconds"]) if found else None

    def run(self, step: str, *words: str | Path, verdict: bool = False) -> str:
        """Run one of our commands; its stderr goes to the step's log, its stdout there too and back to the caller.

        ``verdict``: exit code 8 is an answer as well. Raises StepFailed with what the command said last.
        """
        log = self.folder / f"{step}.log"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ minitron {shlex.join(map(str, words))}\n")
            file.flush()
            start = file.tell()
            done = children.run(*words, stdout=subprocess.PIPE, stderr=file, environment=self._environment)
            file.write(done.stdout)
        if done.returncode not in (_JUDGED if verdict else (0,)):
            raise StepFailed(done.returncode, self._said(log, start, done.returncode), done.stdout)
        return done.stdout

    def _said(self, log: Path, start: int, code: int) -> str:
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(start)
            lines = [line.strip() for line in file if line.strip()]
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("minitron: error: ")]
        return (errors or lines or [f"it ended with {code} and said nothing"])[-1]


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    return files.sha256_file(path) if path.is_file() else None


def _key(inputs: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, inputs], sort_keys=True, default=str).encode()).hexdigest()


def _is_recipe(name: str) -> bool:
    return name == recipe.ENVIRONMENT or name.startswith(recipe.ENVIRONMENT + "_")
