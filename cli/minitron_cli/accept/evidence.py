"""The folder of an acceptance: what each step said and left, and which steps are done for which inputs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from minitron import checks, files
from minitron.checks import FAIL, Check
from minitron.version import VERSION

_STEPS = "steps.json"


class Evidence:
    """``folder`` holds for each step NAME.log (all it printed), NAME.json (its checks) and what else it made.

    ``fresh``: nothing is remembered. ``anew``: the steps that are done again whatever is remembered of them.
    """

    def __init__(self, folder: Path, *, fresh: bool = False, anew: Collection[str] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._anew = folder / _STEPS, anew
        self._done: dict[str, dict[str, Any]] = {} if fresh else self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            loaded: dict[str, dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))
            return loaded
        except (OSError, ValueError):
            return {}

    def _known(self, step: str, inputs: Any) -> list[Check] | None:
        found = self._done.get(step)
        if step in self._anew or not found or found["key"] != _key(inputs):
            return None
        return [Check.of(check) for check in found["lines"]]

    def do(self, step: str, inputs: Any, work: Callable[[], Sequence[Check]], made: Path | None = None) -> list[Check]:
        """The checks of a step, made now unless it was finished for the same inputs by the same toolkit.

        ``made`` is a file that later steps need of it: without that it is done again.

        A step that failed is not remembered: the next run tries it again. Raises what ``work`` raises.
        """
        known = self._known(step, inputs)
        if known is not None and (made is None or made.exists()):
            return known
        started = time.monotonic()
        found = list(work())
        if any(check.verdict == FAIL for check in found):
            return found
        self._done[step] = {"key": _key(inputs), "seconds": round(time.monotonic() - started, 1),
                            "lines": [check.document() for check in found]}  # fmt: skip
        files.write_text(self._path, json.dumps(self._done, indent=1) + "\n")
        return found

    def seconds(self, step: str) -> float | None:
        """How long a finished step took."""
        found = self._done.get(step)
        return float(found["seconds"]) if found else None

    def keep(self, step: str, found: Sequence[Check], **more: Any) -> Sequence[Check]:
        """Store what a step judged, and what else belongs to it, as NAME.json; returns ``found``."""
        checks.store(self.folder / f"{step}.json", found, **more)
        return found

    def log(self, step: str) -> Path:
        """Where all that a step prints goes."""
        return self.folder / f"{step}.log"

    @contextlib.contextmanager
    def logged(self, step: str) -> Iterator[None]:
        """Write to the step's log what is printed and logged in the block, to stdout or stderr, and nowhere else."""
        said = _Said(self.log(step))
        root = logging.getLogger()
        before, handler = root.handlers[:], logging.StreamHandler(said)
        root.handlers[:] = [handler]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
        finally:
            root.handlers[:] = before
            said.close()


class _Said(io.TextIOBase):
    """A text file that is there once something was written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close
        return self._file.write(text)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def fileno(self) -> int:
        """Of the open file, for the children that write there as well."""
        self.write("")
        assert self._file is not None
        return self._file.fileno()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    return files.sha256_file(path) if path.is_file() else None


def _key(inputs: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, inputs], sort_keys=True, default=str).encode()).hexdigest()
