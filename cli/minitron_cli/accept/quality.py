"""The tasks that a served engine has to be good enough at: ``minitron eval`` with its gate, asked of the server."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.checks import SKIPPED, Check, judge
from minitron.errors import UsageError, VerdictError
from minitron_cli import main
from minitron_cli.accept.evidence import digest
from minitron_cli.accept.serving import FoundServer

_CHECK = "tasks.gate"
#: What the acceptance says itself.
_OURS = ("--url", "--tokenizer", "--output", "--resume", "--json")


def words_of(given: str | None) -> tuple[str, ...]:
    """``--eval``'s words for 'minitron eval', none without it, looked at before a server is.

    Raises UsageError where they hold no gate; ends the process where 'minitron eval' has no such arguments.
    """
    if given is None:
        return ()
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise UsageError(f"--eval: {error} in {given!r}") from None
    names = {word.partition("=")[0] for word in words}
    if ours := sorted(names & set(_OURS)):
        raise UsageError(f"--eval: {ours[0]} is said by the acceptance")
    if missing := [flag for flag in ("--baseline", "--tolerance") if flag not in names]:
        raise UsageError(f"--eval has no {missing[0]}, and without a gate there is nothing to hold")
    main.parsed("eval", *words)
    return tuple(words)


def inputs(words: Sequence[str]) -> list[Any]:
    """What a verdict depends on beside the engine."""
    paths = (Path(word.rpartition("=")[2]) for word in words)
    return [*words, *(digest(path) for path in paths if path.is_file())]


def judge_tasks(serving: FoundServer, repository: Path, of: str, words: Sequence[str], folder: Path) -> list[Check]:
    """Ask the server over gRPC; the run is kept in ``folder``.

    ``of``: digest of ``repository``. Answers lie beside the run until it is judged, under that name: an address says
    nothing about who answers there, and those of another engine, or of a run that was judged, are not for this one.
    """
    if not words:
        return [Check(_CHECK, SKIPPED, "no tasks were given (--eval)")]
    url = f"grpc://{serving.urls()['grpc']}"
    answers, problems = folder / f"eval-answers-{of[:16]}.jsonl", []
    kept = ("--output", folder / "eval.json", "--resume", answers)
    try:
        main.call("eval", *words, "--url", url, "--tokenizer", repository / "tokenizer", *kept)
    except VerdictError as found:  # worse, or not to be told
        problems = [str(found)]
    answers.unlink(missing_ok=True)
    within = f"no task is worse than the baseline by more than its tolerance: {shlex.join(words)}"
    return [judge(_CHECK, problems, within)]
