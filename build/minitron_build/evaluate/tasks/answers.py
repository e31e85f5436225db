"""What a model answered, request by request: noted in a file as soon as it is known, so that an ended run can go on.

The file holds JSON lines, one for each answer: the digest of whose it is (``of``: the model's files and how it was run)
and of the request, and the answer. Which task asked does not matter: the same request has the same answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lm_eval.api.model import LM

from minitron.errors import InputError
from minitron_build.evaluate.journal import NotOfThisRun, resumed

log = logging.getLogger(__name__)

#: Requests that are handed over together. Neighbours begin alike, and what they share is computed once.
_PORTION = 64
_SECONDS_BETWEEN_LINES = 5.0


class AnswerStore:
    """Answers by whose they are and the request's digest; appended to a file if there is one."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = file
        self._known: dict[tuple[str, str], Any] = {}

    def get(self, of: str, request: str) -> Any:
        """The answer as it was given; None where it is not known."""
        return self._known.get((of, request))

    def note(self, of: str, request: str, answer: Any) -> None:
        """Keep an answer, which JSON can hold."""
        self._known[of, request] = answer
        if self._file is not None:
            self._file.write(json.dumps({"of": of, "request": request, "answer": answer}).encode() + b"\n")

    def flush(self) -> None:
        """Let what was noted outlive this process."""
        if self._file is not None:
            self._file.flush()

    def read(self, lines: list[bytes]) -> None:
        """Take what a file holds; raises NotOfThisRun."""
        try:
            for line in map(json.loads, lines):
                self._known[line["of"], line["request"]] = line["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise NotOfThisRun(InputError, f"it is no record of answers ({error!r})") from None


@contextmanager
def open_answers(path: Path | None) -> Iterator[AnswerStore]:
    """Those in the file ``path``, to which new ones are added; in memory for None.

    Raises UsageError where another run has the file, InputError, OutputError.
    """
    if path is None:
        yield AnswerStore()
        return
    with resumed(path) as (file, lines):
        answers = AnswerStore(file)
        answers.read(lines)
        yield answers


class Noted(LM):  # type: ignore[misc]  # lm-eval is not always installed
    """A model of lm-eval's whose answers are noted, and which tells how long it will take. ``of``: see the module."""

    def __init__(self, model: LM, name: str, of: str, answers: AnswerStore) -> None:
        super().__init__()
        self._model, self._name, self._of, self._answers = model, name, of, answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log prob of each ending, and whether it is the likeliest text."""
        return [(float(found[0]), bool(found[1])) for found in self._through("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log prob of each whole text."""
        return [float(found) for found in self._through("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Each answer."""
        return [str(found) for found in self._through("generate_until", requests)]

    def _through(self, kind: str, requests: list[Any]) -> list[Any]:
        keys = [_digest(kind, request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True)
                   if self._answers.get(self._of, key) is None}  # fmt: skip
        order = sorted(missing.items(), key=lambda item: str(item[1].args[0]))
        progress = _Progress(self._name, kind, len(set(keys)), [_size(request) for _, request in order])
        for begin in range(0, len(order), _PORTION):
            portion = order[begin : begin + _PORTION]
            found = getattr(self._model, kind)([request for _, request in portion], disable_tqdm=True)
            for (key, _), answer in zip(portion, found, strict=True):
                self._answers.note(self._of, key, answer)
            self._answers.flush()
            progress.say(begin + len(portion))
        return [self._answers.get(self._of, key) for key in keys]


def _digest(kind: str, args: Any) -> str:
    return hashlib.sha256(json.dumps([kind, *args], sort_keys=True).encode()).hexdigest()[:32]


def _size(request: Any) -> int:
    """What a request costs, about: its characters, and those of an answer that is to be written token by token."""
    args = request.args
    written = args[1].get("max_gen_toks", 256) if len(args) > 1 and isinstance(args[1], dict) else 0
    return len(args[0]) + (len(args[1]) if len(args) > 1 and isinstance(args[1], str) else 4 * written)


class _Progress:
    """A line every few seconds: how far, and how long it will take by what the rest of the requests costs."""

    def __init__(self, name: str, kind: str, total: int, sizes: list[int]) -> None:
        self._name, self._kind, self._total, self._sizes = name, kind, total, sizes
        self._before = total - len(sizes)
        self._started = self._last = time.monotonic()
        if self._before:
            log.info("%s: %d of %d requests (%s) were answered before", name, self._before, total, kind)

    def say(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._started) * sum(self._sizes[done:]) / max(sum(self._sizes[:done]), 1)
        log.info(
            "%s: %d of %d requests (%s), %.0f s left", self._name, self._before + done, self._total, self._kind, left
        )
