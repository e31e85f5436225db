"""Is a model good enough, task by task: not worse than a baseline by more than a tolerance.

The difference from the baseline has a 95 % interval. **pass**: all of it lies above minus the tolerance; **fail**: all
of it lies below; **undecided**: the questions are too few to tell, and so many more would do. Where both were asked the
same questions, each is compared with itself, which takes far fewer of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron import files
from minitron.errors import InputError, UsageError
from minitron_build.evaluate.tasks import statistics
from minitron_build.evaluate.tasks.statistics import Interval
from minitron_build.evaluate.tasks.suites import SuiteTask

PASS, FAIL, UNDECIDED, NOT_JUDGED = "pass", "fail", "undecided", "not judged"
CARD = "card"
#: Below so many questions a bootstrap's interval is too narrow, and nothing is said.
_LEAST_FOR_BOOTSTRAP = 30


@dataclass(frozen=True)
class Verdict:
    """Of one task: both values, the difference from the baseline with its interval, and how it was found.

    ``needed``: about how many questions would decide, where they are too few; None where none would.
    ``probability``: McNemar's, of paired right and wrong answers.
    """

    task: str
    outcome: str
    value: float | None = None
    baseline: float | None = None
    difference: Interval | None = None
    count: int = 0
    method: str = ""
    needed: int | None = None
    probability: float | None = None
    why: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def read_baseline(name: str, entries: Sequence[SuiteTask]) -> dict[str, Any]:
    """The tasks of a run's one subject, by name, or the card's figures; raises InputError, UsageError."""
    if name == CARD:
        return {
            entry.task: {"value": entry.card, "count": entry.questions, "metric": entry.metric, "shots": entry.shots,
                         "questions": {}}
            for entry in entries if entry.card is not None
        }  # fmt: skip
    try:
        run = json.loads(files.read_text(Path(name)))
        subjects = run["subjects"] if run["kind"] == "tasks" and run["schema"] == 1 else None
    except (ValueError, KeyError, TypeError):
        subjects = None
    if subjects is None:
        raise InputError(
            f"--baseline {name} is no run of 'minitron eval --tasks' or '--suite' (--output FILE stores one)"
        )
    if len(subjects) != 1:
        raise UsageError(f"--baseline {name} has {len(subjects)} subjects, and one is needed")
    tasks: dict[str, Any] = subjects[0]["tasks"]
    return tasks


def judge(tasks: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float) -> list[Verdict]:
    """A verdict for each task of a subject; one that the baseline does not have is not judged."""
    return [_judge(name, task, baseline.get(name), tolerance) for name, task in tasks.items()]


def worst(verdicts: Sequence[Verdict]) -> str:
    """FAIL where one fails, UNDECIDED where one is, PASS where all that were judged pass; NOT_JUDGED where none was."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return next((outcome for outcome in (FAIL, UNDECIDED, PASS) if outcome in outcomes), NOT_JUDGED)


def _judge(name: str, task: Mapping[str, Any], base: Mapping[str, Any] | None, tolerance: float) -> Verdict:
    if task.get("value") is None:
        return Verdict(
            name, NOT_JUDGED, why="its figure is not one of questions; --reference and --text compare models on a text"
        )
    if base is None or base.get("value") is None:
        return Verdict(name, NOT_JUDGED, task["value"], count=task["count"], why="the baseline does not have it")
    for key, what in (("metric", "was judged by"), ("shots", "was shown")):
        if task[key] != base[key]:
            why = f"the baseline {what} {base[key]} ({key}), and this {task[key]}"
            return Verdict(name, NOT_JUDGED, task["value"], base["value"], count=task["count"], why=why)
    same = task["questions"].keys() <= base["questions"].keys()
    difference, method, probability = _paired(task, base) if same else _unpaired(task, base)
    count, low, high = len(task["questions"]), difference.low, difference.high
    few = not _is_binary(task["questions"].values()) and count < _LEAST_FOR_BOOTSTRAP
    told = PASS if low >= -tolerance else FAIL if high < -tolerance else UNDECIDED
    outcome = UNDECIDED if few else told
    needed = None
    if outcome == UNDECIDED:
        needed = _LEAST_FOR_BOOTSTRAP if few else _needed(difference, tolerance, count)
    against = task["value"] - difference.value  # of the same questions, where those are fewer than the baseline's
    return Verdict(name, outcome, task["value"], against, difference, count, method, needed, probability)


def _needed(difference: Interval, tolerance: float, count: int) -> int | None:
    """Questions at which the interval, which narrows with their root, would leave out minus the tolerance.

    As things stand: the difference itself will be another one then.
    """
    distance = difference.value + tolerance
    half = difference.value - difference.low if distance > 0 else difference.high - difference.value
    if not abs(distance) > 1e-3 * max(tolerance, 1e-6):
        return None
    return max(math.ceil(count * (half / distance) ** 2), count + 1)


def _paired(task: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[Interval, str, float | None]:
    ours = np.array([task["questions"][key] for key in task["questions"]], np.float64)
    theirs = np.array([base["questions"][key] for key in task["questions"]], np.float64)
    if not (_is_binary(ours) and _is_binary(theirs)):
        return statistics.difference_of_paired_values(ours, theirs), "paired bootstrap", None
    gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    interval = statistics.difference_of_paired_shares(gained, lost, len(ours))
    return interval, f"paired, {gained} gained, {lost} lost", statistics.mcnemar(gained, lost)


def _unpaired(task: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[Interval, str, float | None]:
    """Of other questions, or of the card, which says nothing of single ones."""
    counts = len(task["questions"]), int(base["count"])
    binary = _is_binary(task["questions"].values()) and _is_binary(base["questions"].values())
    if binary:
        shares = [
            statistics.share(one["value"] * count, count) for one, count in zip((task, base), counts, strict=True)
        ]
        return statistics.difference_of_shares(*shares), "not paired", None
    error = task["standard_error"]
    other = base.get("standard_error", error * math.sqrt(counts[0] / counts[1]))  # the card's: as if spread alike
    found = statistics.difference_of_means((task["value"], error), (base["value"], other))
    return found, "not paired", None


def _is_binary(values: Any) -> bool:
    return set(values) <= {0.0, 1.0}
