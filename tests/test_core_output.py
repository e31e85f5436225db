"""What people and programs see. Expected strings are written by hand."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pytest

from conftest import ROOT
from minitron import console


def test_numbers_stand_right_and_words_left() -> None:
    text = console.table([["a", 1, "12.5%"], ["long", 1234, "3%"]], ["name", "count", "share"])
    assert text == "name  count  share\n----  -----  -----\na         1  12.5%\nlong   1234     3%"


def test_a_table_without_rows_is_its_head() -> None:
    assert console.table([], ["a"]) == "a\n-"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (8_380_000_000, "8.38 GB"), (5e12, "5000.00 GB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert console.human_bytes(count) == text


def test_progress_counts_from_several_threads() -> None:
    with console.Progress(8000, "work") as progress:

        def count() -> None:
            for _ in range(1000):
                progress.advance(1)

        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "100%, 8000 tensors" in progress._line("x")


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from minitron import console
console._SECONDS_BETWEEN_LINES = 0
with console.Progress(100, "work") as progress:
    progress.advance(50, "tensor.name")
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "core")}


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr.startswith("work:  50%, 1 tensors, ")
    assert done.stderr.rstrip().endswith("tensor.name")
    assert "\r" not in done.stderr


def test_on_a_terminal_progress_is_a_bar() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a bar needs a width
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment())
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:
        pass  # Linux says EIO when the child has closed its side
    os.close(ours)
    assert child.wait() == 0
    assert b"work:" in seen
    assert b"\r" in seen
