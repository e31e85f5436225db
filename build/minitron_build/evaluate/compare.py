"""Measure models on a text, one after the other, against a reference that runs first.

Only one model is in memory at a time: the reference's distributions wait in a file. What was measured is noted window
by window, and the report is made of the notes, whether the run came to its end or not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import InputError, UsageError
from minitron.model.activations import Activations
from minitron.version import VERSION
from minitron_build.evaluate import text
from minitron_build.evaluate.candidate import Candidate, digest, prepare
from minitron_build.evaluate.distributions import Distributions, open_distributions
from minitron_build.evaluate.journal import REFERENCE, Journal, open_journal
from minitron_build.evaluate.measures import Window, figures
from minitron_build.evaluate.text import Windows

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Report:
    """What was measured: JSON values.

    ``complete`` is False where the user interrupted: figures are then of the windows done, as many tokens as each row
    says, and candidates that were ``not_begun`` have none.
    """

    text: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    not_begun: list[str] = field(default_factory=list)
    complete: bool = True

    def worst(self) -> dict[str, Any] | None:
        """The candidate with the largest mean divergence."""
        return max(self.candidates, key=lambda row: (math.isnan(row["mean_kl"]), row["mean_kl"]), default=None)


def compare(
    reference: str,
    candidates: Sequence[str],
    file: Path,
    *,
    context: int | None = None,
    tokens: int | None = None,
    scratch: Path | None = None,
    resume: Path | None = None,
) -> Report:
    """Measure ``candidates`` against ``reference`` on the UTF-8 text in ``file``.

    The text is tokenised whole with the reference's tokenizer and cut into windows of ``context`` tokens (512 unless
    given), which do not overlap; all tokens of a window but its first are predicted from those before. ``tokens``
    limits the text. Ctrl-C ends the measuring and gives what the windows done until then say. With ``resume``, a file
    in which they are noted, the next call goes on from there, also after a kill; candidates may have been added.

    Raises UsageError, InputError, OutputError, NoSpace.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-quality-", dir=scratch) as made:
        folder = Path(made)
        subject = prepare(reference, _new(folder, "reference"))
        subject.check_reference()
        ids = text.token_ids(subject, file)[:tokens]
        windows = text.cut(ids, context, subject.max_tokens)
        comparison = _comparison(reference, windows) if resume else {}
        keyed = [(digest(name) if resume else str(number), name) for number, name in enumerate(candidates)]
        with open_journal(resume, comparison, folder) as journal:
            complete = _measure(subject, keyed, windows, journal, folder)
            about = {"file": str(file), "tokens": len(ids), "predicted": text.predicted(windows),
                     "context": max(map(len, windows))}  # fmt: skip
            return _report(about, reference, keyed, journal, complete)


def _comparison(reference: str, windows: Windows) -> dict[str, Any]:
    """What must be the same for windows measured earlier to count."""
    from minitron.machine.openvino import VERSION as ENGINE

    ids = hashlib.sha256(b"".join(window.tobytes() for window in windows)).hexdigest()
    return {"toolkit": VERSION, "engine": ENGINE, "reference": digest(reference), "text": ids,
            "context": max(map(len, windows))}  # fmt: skip


def _report(
    about: dict[str, Any], reference: str, candidates: list[tuple[str, str]], journal: Journal, complete: bool
) -> Report:
    def row(key: str, name: str) -> dict[str, Any]:
        windows, is_ = journal.windows(key), journal.description(key)
        return {"name": name} | is_ | figures(windows) | _activations(windows, is_.get("source"), about)

    return Report(
        about,
        row(REFERENCE, reference) if journal.windows(REFERENCE) else {},
        [row(*candidate) for candidate in candidates if journal.windows(candidate[0])],
        [name for key, name in candidates if not journal.windows(key)],
        complete,
    )


def _activations(windows: list[Window], source: str | None, about: dict[str, Any]) -> dict[str, Any]:
    """The largest magnitudes over all windows; nothing where one was not looked at."""
    if not all(window.peaks for window in windows):
        return {}
    merged = Window()
    for window in windows:
        merged.reach(window.peaks)
    found = {kind: tuple(values) for kind, values in merged.peaks.items()}
    return {"activations": Activations(**found, model=source, about=about).document()}


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _measure(
    subject: Candidate, candidates: list[tuple[str, str]], windows: Windows, journal: Journal, folder: Path
) -> bool:
    """Measure what the journal does not hold yet; False where the user interrupted."""
    missing = [(key, name) for key, name in candidates if len(journal.windows(key)) < len(windows)]
    if not missing and len(journal.windows(REFERENCE)) == len(windows):
        return True
    with open_distributions(journal.distributions, windows, subject.vocab_size) as store:
        try:
            _measure_reference(subject, windows, store, journal)
            if folder in subject.engine.parents:  # its own conversion: give the space back
                shutil.rmtree(subject.engine.parent)
            for key, name in missing:
                _measure_candidate(key, name, subject, windows=windows, store=store, journal=journal, folder=folder)
        except KeyboardInterrupt:
            log.info("interrupted; what was measured until now:")
            return False
    journal.distributions.unlink()
    return True


def _measure_reference(subject: Candidate, windows: Windows, store: Distributions, journal: Journal) -> None:
    """Run the windows whose distributions are not there, and note those that had not been."""
    done = journal.windows(REFERENCE)
    first = min(len(done), store.whole())
    if first == len(windows):
        return
    journal.describe(REFERENCE, subject.description())
    running, progress = _running(subject), _Progress(subject.name, windows, first)
    store.begin(first)
    for index in range(first, len(windows)):
        window = Window()
        for rows, following in running.predictions(windows[index]):
            store.append(rows)
            window.add(rows, following)
            window.reach(running.largest())
        store.flush()
        if index == len(done):
            journal.add(REFERENCE, window)
        progress.say(done[: index + 1])


def _measure_candidate(
    key: str, name: str, reference: Candidate, *, windows: Windows, store: Distributions, journal: Journal, folder: Path
) -> None:
    done = journal.windows(key)
    if len(done) == len(windows):  # named twice
        return
    subject = prepare(name, _new(folder, "candidate"))
    try:
        _check_comparable(subject, reference, max(map(len, windows)))
        journal.describe(key, subject.description())
        running, progress = _running(subject), _Progress(name, windows, len(done))
        for index in range(len(done), len(windows)):
            window, again = Window(), Window()
            store.seek(index)
            for rows, following in running.predictions(windows[index]):
                wanted = store.read(rows)
                again.add(wanted, following)
                window.add(rows, following, wanted)
                window.reach(running.largest())
            if not np.allclose(again.negative, journal.windows(REFERENCE)[index].negative):
                raise InputError(f"{journal.distributions} is damaged; remove it")
            journal.add(key, window)
            progress.say(done)
    finally:
        shutil.rmtree(folder / "candidate")


def _check_comparable(subject: Candidate, reference: Candidate, window: int) -> None:
    if subject.vocab_size != reference.vocab_size:
        raise UsageError(
            f"{subject.name} has {subject.vocab_size} tokens and {reference.name} {reference.vocab_size}: they are not "
            "the same model"
        )
    if subject.max_tokens < window:
        raise UsageError(
            f"{subject.name} takes {subject.max_tokens} tokens at once; give --context {subject.max_tokens}"
        )


def _running(subject: Candidate) -> Any:
    from minitron_build.evaluate.running import RunningEngine

    return RunningEngine(subject.engine)


class _Progress:
    """A line every few seconds: how far, and the perplexity so far. ``before``: windows of an earlier run."""

    def __init__(self, name: str, windows: Windows, before: int) -> None:
        self._name, self._total, self._before = name, text.predicted(windows), text.predicted(windows[:before])
        self._started = self._last = time.monotonic()
        if before:
            log.info("%s: %d of %d tokens were measured before", name, self._before, self._total)

    def say(self, done: Sequence[Window]) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last, found = now, figures(done)
        left = (now - self._started) * (self._total - found["tokens"]) / max(found["tokens"] - self._before, 1)
        log.info("%s: %d of %d tokens, perplexity %.3f, %.0f s left",
                 self._name, found["tokens"], self._total, found["perplexity"], left)  # fmt: skip
