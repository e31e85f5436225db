"""Named suites of tasks, and the figures that cards of models give: data beside this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from minitron import documents
from minitron.errors import UsageError

#: The metric that a task is judged by where no suite says it: the first of these that it has.
_PREFERRED = ("exact_match", "acc_norm", "acc")


@dataclass(frozen=True)
class SuiteTask:
    """A task or group as a suite has it: how many questions are shown with their answers, and what it is judged by.

    ``filter`` is lm-eval's name of what was taken out of an answer. ``card`` is the card's figure, a share, and
    ``questions`` how many the card's was made of. ``shots`` None: lm-eval's own.
    """

    task: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    card: float | None = None
    questions: int | None = None
    runs_code: bool = False

    def metric_of(self, metrics: Sequence[str]) -> str | None:
        """Which of a task's metrics it is judged by; None where none is a figure of each question."""
        if self.metric in metrics:
            return self.metric
        return next((name for name in _PREFERRED if name in metrics), None)


def suite(name: str) -> list[SuiteTask]:
    """The tasks of a suite; raises UsageError."""
    known = _suites()
    if name not in known:
        raise UsageError(f"there is no suite {name!r}; there are {', '.join(known)}")
    return [SuiteTask(**entry) for entry in known[name]["tasks"]]


def names() -> list[str]:
    """The suites that there are."""
    return list(_suites())


def of_tasks(names_of_tasks: Sequence[str], shots: int | None) -> list[SuiteTask]:
    """Tasks that the user named, all with so many shots."""
    return [SuiteTask(name, shots) for name in names_of_tasks]


def _suites() -> dict[str, Any]:
    text = (resources.files("minitron_build.evaluate.tasks") / "suites.yaml").read_text(encoding="utf-8")
    return documents.mapping(text, "suites.yaml")
