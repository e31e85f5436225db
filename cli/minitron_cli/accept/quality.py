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
from minitron_cli.accept.serving import Running

_CHECK = "tasks.gate"
#: What the acceptance says itself.
_OURS = ("--url", "--tokenizer", "--output", "--resume", "--json")


def words_of(given: str | None) -> tuple[str, ...]:
    """``--eval``'s words for 'minitron eval', none without it; raises UsageError where they hold no gate."""
    if given is None:
        return ()
    words = shlex.split(given)
    names = {word.partition("=")[0] for word in words}
    if ours := sorted(names & set(_OURS)):
        raise UsageError(f"--eval: {ours[0]} is said by the acceptance")
    if missing := [flag for flag in ("--baseline", "--tolerance") if flag not in names]:
        raise UsageError(f"--eval has no {missing[0]}, and without a gate there is nothing to hold")
    return tuple(words)


def inputs(words: Sequence[str]) -> list[Any]:
    """What a verdict depends on beside the engine."""
    return [*words, *(digest(Path(word)) for word in words if Path(word).is_file())]


def judge_tasks(serving: Running, tokenizer: Path, words: Sequence[str], folder: Path) -> list[Check]:
    """Ask the server over gRPC; the run and what each question got are kept in ``folder``."""
    if not words:
        return [Check(_CHECK, SKIPPED, "no tasks were given (--eval)")]
    url = f"grpc://{serving.urls()['grpc']}"
    kept = ("--output", folder / "eval.json", "--resume", folder / "eval-answers.jsonl")
    try:
        main.call("eval", *words, "--url", url, "--tokenizer", tokenizer, *kept)
    except VerdictError as found:  # worse, or not to be told
        return [judge(_CHECK, [str(found)], "")]
    return [judge(_CHECK, [], f"no task is worse than the baseline by more than its tolerance: {shlex.join(words)}")]
