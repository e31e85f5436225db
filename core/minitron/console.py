"""What people and programs see: tables and one JSON document on stdout, progress on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Lay out rows in columns: numbers to the right, words to the left, no colours."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) or _numeric(row[i]) for row in rows)
        for i in range(len(head))
    ]
    lines = [list(head), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _numeric(cell: object) -> bool:
    text = str(cell).replace(",", "").removesuffix("%").strip()
    return text in ("", "-") or text.replace(".", "", 1).replace("-", "", 1).isdigit()


def discard_stdout() -> None:
    """Send what is still printed nowhere: its reader (head, less) has left, and what Python says at exit is noise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit_json(document: Any) -> None:
    """Print the one JSON document of a ``--json`` run."""
    json.dump(document, sys.stdout, indent=1)
    print(flush=True)


def human_bytes(count: float) -> str:
    """``1.23 GB`` style, powers of ten."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class Progress:
    """Work measured in bytes: a bar with rate and remaining time on a terminal, a log line every few seconds elsewhere.

    Used as a context manager; ``advance`` may be called from several threads.
    """

    def __init__(self, total_bytes: int, what: str) -> None:
        self._total, self._what, self._done, self._items = total_bytes, what, 0, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit="B", unit_scale=True, leave=False)
        return self

    def advance(self, count: int, item: str = "", items: int = 1) -> None:
        """Count ``count`` more bytes done, the last of them belonging to ``item``, and ``items`` items complete."""
        with self._lock:
            self._done += count
            self._items += items
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self._items} {item}"[:40], refresh=False)
                self._bar.update(count)
            elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                log.info("%s", self._line(item))

    def _line(self, item: str) -> str:
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        share = self._done / self._total if self._total else 1.0
        pace = f"{human_bytes(rate)}/s, {left:.0f} s left"
        return f"{self._what}: {share:4.0%}, {self._items} tensors, {pace} {item}".rstrip()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
