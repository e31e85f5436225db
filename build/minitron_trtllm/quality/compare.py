"""Measure models on a text, one after the other, against a reference that runs first.

The reference's distributions wait in a scratch file (4 bytes for each token of the text and of the vocabulary), so that
only one model is in memory at a time.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from minitron_trtllm.errors import InputError, NoSpace, UsageError
from minitron_trtllm.quality.measures import Divergence, Likelihood, Rows
from minitron_trtllm.quality.subject import Subject, prepare

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_DEFAULT_CONTEXT = 512

Windows = list[npt.NDArray[np.int64]]


@dataclass
class Report:
    """What was measured: JSON values. ``complete`` is False where the user interrupted; the rest holds up to there."""

    text: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True

    def worst(self) -> dict[str, Any] | None:
        """The candidate with the largest mean divergence."""
        return max(self.candidates, key=lambda row: float(row["mean_kl"]), default=None)


def compare(
    reference: str,
    candidates: Sequence[str],
    text: Path,
    *,
    context: int | None = None,
    tokens: int | None = None,
    scratch: Path | None = None,
) -> Report:
    """Measure ``candidates`` against ``reference`` on a UTF-8 ``text``.

    The text is tokenised whole with the reference's tokenizer and cut into windows of ``context`` tokens (512 unless
    given), which do not overlap; all tokens of a window but its first are predicted from those before. ``tokens``
    limits the text. Ctrl-C ends the measuring and gives what there is until then.

    Raises UsageError, InputError, NoSpace.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-quality-", dir=scratch) as folder:
        subject = prepare(reference, _new(Path(folder), "reference"))
        subject.check_reference()
        ids = _token_ids(subject, text)[:tokens]
        windows = _cut(ids, context, subject.max_tokens)
        report = Report({"file": str(text), "tokens": len(ids), "context": max(map(len, windows))})
        with _distributions(Path(folder), sum(map(len, windows)) * subject.vocab_size * 4) as store:
            try:
                _measure_reference(subject, windows, store, report)
                _discard(subject, Path(folder))
                for name in candidates:
                    _measure_candidate(name, subject, windows, store=store, report=report, folder=Path(folder))
            except KeyboardInterrupt:
                log.info("interrupted; what was measured until now:")
                report.complete = False
        return report


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _discard(subject: Subject, folder: Path) -> None:
    """Give the space back that a subject's own conversion took."""
    if folder in subject.engine.parents:
        shutil.rmtree(subject.engine.parent)


def _token_ids(subject: Subject, text: Path) -> npt.NDArray[np.int64]:
    from tokenizers import Tokenizer

    path = subject.engine / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{subject.name} has no tokenizer.json, and the text is to be tokenised with it")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{text} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    return np.array(Tokenizer.from_file(str(path)).encode(content, add_special_tokens=False).ids, np.int64)


def _cut(ids: npt.NDArray[np.int64], context: int | None, longest: int) -> Windows:
    if context is not None and not 2 <= context <= longest:
        raise UsageError(f"--context {context} must be from 2 to the {longest} tokens that the reference takes at once")
    length = context or min(_DEFAULT_CONTEXT, longest)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise InputError(f"the text has {len(ids)} tokens, and at least 2 are needed")
    return windows


@contextmanager
def _distributions(folder: Path, needed: int) -> Iterator[BinaryIO]:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(
            f"{folder.parent} has {free:,} bytes free and {needed:,} are needed; take fewer --tokens, or --scratch"
        )
    with open(folder / "reference.f32", "w+b") as file:
        yield file


def _measure_reference(subject: Subject, windows: Windows, store: BinaryIO, report: Report) -> None:
    likelihood, progress = Likelihood(), _Progress(subject.name, windows)
    try:
        for rows, following in _predictions(subject, windows):
            store.write(np.ascontiguousarray(rows).data)
            likelihood.add(rows, following)
            progress.say(likelihood)
    finally:
        if likelihood.tokens:
            report.reference = _row(subject, likelihood)


def _measure_candidate(
    name: str, reference: Subject, windows: Windows, *, store: BinaryIO, report: Report, folder: Path
) -> None:
    subject = prepare(name, _new(folder, "candidate"))
    try:
        _check_comparable(subject, reference, max(map(len, windows)))
        likelihood, divergence, progress = Likelihood(), Divergence(), _Progress(name, windows)
        store.seek(0)
        try:
            for rows, following in _predictions(subject, windows):
                divergence.add(_read(store, rows), rows)
                likelihood.add(rows, following)
                progress.say(likelihood)
        finally:
            if divergence.nats and likelihood.tokens:
                report.candidates.append(_row(subject, likelihood) | divergence.figures())
    finally:
        shutil.rmtree(folder / "candidate")


def _check_comparable(subject: Subject, reference: Subject, window: int) -> None:
    if subject.vocab_size != reference.vocab_size:
        raise UsageError(
            f"{subject.name} has {subject.vocab_size} tokens and {reference.name} {reference.vocab_size}: they are not "
            "the same model"
        )
    if subject.max_tokens < window:
        raise UsageError(
            f"{subject.name} takes {subject.max_tokens} tokens at once; give --context {subject.max_tokens}"
        )


def _predictions(subject: Subject, windows: Windows) -> Iterator[tuple[Rows, npt.NDArray[np.int64]]]:
    from minitron_trtllm.quality.running import RunningEngine

    running = RunningEngine(subject.engine, subject.execution)
    for window in windows:
        yield from running.predictions(window)


def _read(store: BinaryIO, like: Rows) -> Rows:
    rows: Rows = np.frombuffer(store.read(like.nbytes), np.float32).reshape(like.shape)
    return rows


def _row(subject: Subject, likelihood: Likelihood) -> dict[str, Any]:
    return {
        "name": subject.name,
        "kind": subject.kind,
        "precision": subject.precision,
        "bytes": subject.size,
        "tokens": likelihood.tokens,
        "perplexity": likelihood.perplexity,
    }


class _Progress:
    """A line every few seconds: how far, and the perplexity so far."""

    def __init__(self, name: str, windows: Windows) -> None:
        self._name, self._total = name, sum(len(window) - 1 for window in windows)
        self._started = self._last = time.monotonic()

    def say(self, likelihood: Likelihood) -> None:
        now, done = time.monotonic(), likelihood.tokens
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._started) * (self._total / done - 1)
        log.info("%s: %d of %d tokens, perplexity %.3f, %.0f s left",
                 self._name, done, self._total, likelihood.perplexity, left)  # fmt: skip
