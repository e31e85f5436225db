"""An interrupted ``minitron eval``: what was measured is shown and, with --resume, not measured again.

The judge of a resumed run is one that nobody interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL
from minitron.errors import InputError, OutputError, UsageError
from minitron_build.evaluate.compare import compare

CONTEXT, TOKENS, WINDOWS = 64, 3000, 47
Lines = list[dict[str, Any]]


class Running:
    """``minitron eval`` as a user starts it, to be ended when so many windows are noted in its file."""

    def __init__(self, *words: str | Path) -> None:
        paths = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minitron_cli", "eval", *map(str, words)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip

    def until(self, state: Path, windows: int) -> Running:
        """Wait until the file has so many windows."""
        for _ in range(12_000):
            if state.exists() and len(noted(state)) >= windows:
                return self
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.01)
        raise AssertionError("nothing is noted")

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal: exit code, stdout and stderr."""
        self._process.send_signal(number)
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out, err


def noted(state: Path) -> Lines:
    """The windows in the file, whole lines only."""
    whole = [json.loads(line) for line in state.read_bytes().split(b"\n")[:-1]]
    return [line for line in whole if "window" in line]


def by_model(state: Path) -> list[int]:
    return list(Counter(line["window"] for line in noted(state)).values())


def figures(report: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [report.reference, *report.candidates]
    return rows


@pytest.mark.slow
def test_killed_told_to_end_and_resumed_gives_the_figures_of_a_run_that_was_left_alone(
    held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    state, scratch = tmp_path / "quality.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    candidates = [str(small_checkpoint("int8_weight_only")), str(small_checkpoint("int4_weight_only"))]
    words = [*candidates, "--reference", str(SMALL_MODEL), "--text", str(held_out), "--context", str(CONTEXT),
             "--tokens", str(TOKENS), "--scratch", str(scratch), "--resume", str(state)]  # fmt: skip

    assert Running(*words).until(state, 10).end(signal.SIGKILL)[0] == -signal.SIGKILL
    with open(state, "ab") as file:
        file.write(b'{"window": "refer')  # it may well be killed in the middle of a line
    before = noted(state)

    code, out, err = Running(*words).until(state, WINDOWS + 5).end(signal.SIGTERM)
    assert code == 130
    assert "tokens were measured before" in err
    assert "INTERRUPTED" in out
    assert candidates[0] in out
    assert f"not begun: {candidates[1]}" in out
    assert "Traceback" not in err
    assert noted(state)[: len(before)] == before

    resumed = compare(str(SMALL_MODEL), candidates, held_out, context=CONTEXT, tokens=TOKENS, resume=state)
    alone = compare(str(SMALL_MODEL), candidates, held_out, context=CONTEXT, tokens=TOKENS)
    assert resumed.complete
    assert figures(resumed) == figures(alone)
    assert by_model(state) == [WINDOWS] * 3, "something was measured twice"
    assert list(tmp_path.glob("quality.jsonl*")) == [state], "the distributions take much space, and nobody needs them"

    again = compare(str(SMALL_MODEL), candidates, held_out, context=CONTEXT, tokens=TOKENS, resume=state)
    assert figures(again) == figures(alone)
    assert by_model(state) == [WINDOWS] * 3


def test_candidates_may_be_added_later(held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    int8, int4 = (str(small_checkpoint(f"{kind}_weight_only")) for kind in ("int8", "int4"))
    state = tmp_path / "quality.jsonl"
    first = compare(str(SMALL_MODEL), [int8], held_out, context=CONTEXT, tokens=300, resume=state)
    both = compare(str(SMALL_MODEL), [int4, int8, int4], held_out, context=CONTEXT, tokens=300, resume=state)
    assert both.candidates[1] == first.candidates[0]
    assert both.candidates[0] == both.candidates[2]
    assert by_model(state) == [5, 5, 5]
    assert both.reference == first.reference


def test_ctrl_c_without_resume_shows_the_windows_done_and_leaves_nothing(
    held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(held_out.read_text(encoding="utf-8") * 8, encoding="utf-8")
    running = Running(small_checkpoint("int8_weight_only"), "--reference", SMALL_MODEL, "--text", long,
                      "--scratch", tmp_path, "--json")  # fmt: skip
    assert running._process.stderr is not None
    for line in running._process.stderr:
        if "tokens, perplexity" in line:
            break
    code, out, _ = running.end(signal.SIGINT)
    assert code == 130
    report = json.loads(out)
    assert report["complete"] is False
    assert 0 < report["reference"]["tokens"] <= report["text"]["predicted"]
    assert report["reference"]["perplexity"] > 1
    assert list(tmp_path.iterdir()) == [long]


def test_a_file_of_something_else_is_refused_and_left_alone(
    held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, int8, state = str(SMALL_MODEL), str(small_checkpoint("int8_weight_only")), tmp_path / "quality.jsonl"

    def run(**changed: Any) -> None:
        given: dict[str, Any] = {"reference": model, "context": CONTEXT, "tokens": 300, "resume": state}
        compare(candidates=[int8], file=held_out, **given | changed)

    run()
    before = state.read_bytes()
    for changed, said in (({"tokens": 200}, "text"), ({"context": 50}, "context"),
                          ({"reference": str(small_checkpoint("bfloat16"))}, "reference")):  # fmt: skip
        with pytest.raises(UsageError, match=f"quality.jsonl: it holds another comparison .*{said}"):
            run(**changed)
    with open(state, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="in use"):
            run()
    assert state.read_bytes() == before
    for content in (b"hello\n", b"[1]\n", b"{}\n", before + b'{"window": "reference", "negative": 1, "other": 2}\n'):
        state.write_bytes(content)
        with pytest.raises((InputError, UsageError), match="remove it"):
            run()
        assert state.read_bytes() == content
    with pytest.raises(OutputError, match="--resume"):
        run(resume=tmp_path)


def test_distributions_that_do_not_fit_the_notes_are_found(
    held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """After a power cut, say, the file can have its length and not its content."""
    state = tmp_path / "quality.jsonl"
    int8, int4 = (str(small_checkpoint(f"{kind}_weight_only")) for kind in ("int8", "int4"))
    compare(str(SMALL_MODEL), [int8], held_out, context=CONTEXT, tokens=300, resume=state)
    (tmp_path / "quality.jsonl.distributions").write_bytes(bytes(295 * 1024 * 4))
    with pytest.raises(InputError, match="damaged"):
        compare(str(SMALL_MODEL), [int4], held_out, context=CONTEXT, tokens=300, resume=state)
