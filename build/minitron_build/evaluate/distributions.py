"""The reference's log-probabilities of every window, in a file: float32 [predicted token, vocabulary]."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minitron.errors import NoSpace
from minitron_build.evaluate import text
from minitron_build.evaluate.measures import Rows
from minitron_build.evaluate.text import Windows


class Distributions:
    """One window after the other; each is read and written some positions at a time."""

    def __init__(self, file: BinaryIO, windows: Windows, vocab_size: int) -> None:
        self._file = file
        self._begins = [4 * vocab_size * text.predicted(windows[:index]) for index in range(len(windows) + 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of all windows."""
        return self._begins[-1]

    def whole(self) -> int:
        """How many windows are there, from the first on."""
        size = self._file.seek(0, 2)
        return max(index for index, begin in enumerate(self._begins) if begin <= size)

    def begin(self, window: int) -> None:
        """Write from this window on; what was there is dropped."""
        self.seek(window)
        self._file.truncate()

    def append(self, rows: Rows) -> None:
        """Write positions [n, vocabulary]."""
        self._file.write(np.ascontiguousarray(rows).data)

    def flush(self) -> None:
        """Let what was written outlive this process."""
        self._file.flush()

    def seek(self, window: int) -> None:
        """Read from this window on."""
        self._file.seek(self._begins[window])

    def read(self, like: Rows) -> Rows:
        """The next positions, as many as ``like`` has."""
        rows: Rows = np.frombuffer(self._file.read(like.nbytes), np.float32).reshape(like.shape)
        return rows


@contextmanager
def open_distributions(path: Path, windows: Windows, vocab_size: int) -> Iterator[Distributions]:
    """The file at ``path``, with what it holds; raises NoSpace where the rest will not fit."""
    path.touch()
    with open(path, "r+b") as file:
        store = Distributions(file, windows, vocab_size)
        needed, free = store.nbytes - path.stat().st_size, shutil.disk_usage(path.parent).free
        if needed > free:
            raise NoSpace(
                f"{path.parent} has {free:,} bytes free and {needed:,} are needed for the reference's distributions; "
                "take fewer --tokens, or --scratch or --resume on another disk"
            )
        yield store
