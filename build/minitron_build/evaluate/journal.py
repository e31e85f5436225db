"""What is measured, window by window: in a file as soon as it is, so that a run that was ended can go on from there.

The file holds JSON lines: first what is compared with what, then a line for each model that was prepared, and one for
each window that was done with it. The reference's distributions, float32 [token, vocabulary], lie beside it (or in the
scratch folder, where no file was asked for) until all candidates are done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minitron.errors import InputError, OutputError, UsageError
from minitron_build.evaluate.measures import Window

REFERENCE = "reference"
"""Stands for the reference where candidates stand by the digest of their files: it may be one of them."""

_DISTRIBUTIONS = ".distributions"


class Journal:
    """Windows done and models seen, by model; appended to a file if there is one."""

    def __init__(self, distributions: Path, file: BinaryIO | None = None) -> None:
        self.distributions, self._file = distributions, file
        self._windows: dict[str, list[Window]] = {}
        self._models: dict[str, dict[str, Any]] = {}

    def begin(self, comparison: dict[str, Any]) -> None:
        """Note what is compared; ``read`` asks for the same."""
        self._write(comparison)

    def windows(self, model: str) -> list[Window]:
        """What was done with a model, from the first window on."""
        return self._windows.setdefault(model, [])

    def description(self, model: str) -> dict[str, Any]:
        """What was noted about a model; empty if nothing was."""
        return self._models.get(model, {})

    def describe(self, model: str, description: dict[str, Any]) -> None:
        """Note what a model is, once."""
        if model not in self._models:
            self._models[model] = description
            self._write({"model": model, "is": description})

    def add(self, model: str, window: Window) -> None:
        """Note the model's next window."""
        self.windows(model).append(window)
        self._write({"window": model} | vars(window))

    def read(self, lines: list[bytes], comparison: dict[str, Any]) -> None:
        """Take what a file holds; raises NotOfThisRun where it is of another comparison, or none."""
        try:
            first, *others = map(json.loads, lines)
            if first != comparison:
                changed = [key for key in comparison if first.get(key) != comparison[key]]
                raise NotOfThisRun(UsageError, f"it holds another comparison ({', '.join(changed)} changed)")
            for line in others:
                if "model" in line:
                    self._models[line["model"]] = line["is"]
                else:
                    self.windows(line.pop("window")).append(Window(**line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise NotOfThisRun(InputError, f"it is no record of a comparison ({error})") from None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


@contextmanager
def open_journal(path: Path | None, comparison: dict[str, Any], scratch: Path) -> Iterator[Journal]:
    """A journal of this ``comparison`` in the file ``path``, with what that holds already; in memory for None.

    Raises UsageError where the file is in use or of another comparison, InputError, OutputError.
    """
    if path is None:
        yield Journal(scratch / f"reference{_DISTRIBUTIONS}")
        return
    with resumed(path) as (file, lines):
        journal = Journal(path.with_name(path.name + _DISTRIBUTIONS), file)
        if lines:
            journal.read(lines, comparison)
        else:
            journal.begin(comparison)
        yield journal


@contextmanager
def resumed(path: Path) -> Iterator[tuple[BinaryIO, list[bytes]]]:
    """A file to append lines to, and the whole lines that an earlier run left in it.

    UsageError and InputError of whoever reads them get the file's name. Raises UsageError where another run has the
    file, OutputError.
    """
    with _locked(path) as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        file.truncate(end)  # what a killed run had not written whole
        try:
            yield file, content[:end].splitlines()
        except NotOfThisRun as error:
            raise error.kind(f"--resume {path}: {error}; remove it, or name another file") from None


class NotOfThisRun(Exception):
    """What a file holds is of another run (``kind`` UsageError), or nothing of the kind (InputError)."""

    def __init__(self, kind: type[UsageError] | type[InputError], what: str) -> None:
        super().__init__(what)
        self.kind = kind


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"--resume {path} cannot be written: {error.strerror}") from None
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--resume {path} is in use by another run") from None
        yield file
