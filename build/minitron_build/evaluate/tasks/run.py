"""Ask a model the questions of tasks: lm-eval's figures, and what each question was worth.

A run is a JSON document; a later run is judged by it question by question (``gate``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import extras
from minitron.errors import InputError, MinitronError, MissingDependency, UsageError
from minitron.version import VERSION
from minitron_build.evaluate.tasks.suites import SuiteTask

SCHEMA = 1
KIND = "tasks"
#: Figures of lm-eval's that are no metric of a task.
_NO_METRIC = ("alias", "sample_len", "sample_count", "name")


@dataclass(frozen=True)
class Asked:
    """What is asked of each subject. ``include``: folder of the user's own tasks; ``limit``: questions of a task."""

    entries: Sequence[SuiteTask]
    data: Path | None = None
    include: Path | None = None
    limit: int | None = None
    allow_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """lm-eval's index of tasks (``manager``), and its tasks of each entry, with their questions."""

    manager: Any
    tasks: dict[str, list[Any]]


def need_lm_eval() -> None:
    """Raise MissingDependency where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency(f"tasks are lm-eval's, which is not installed: {extras.install('eval')}")


def document(asked: Asked, suite: str | None) -> dict[str, Any]:
    """A run of no subject yet."""
    import lm_eval

    return {"kind": KIND, "schema": SCHEMA, "toolkit": VERSION, "lm_eval": lm_eval.__version__, "suite": suite,
            "limit": asked.limit, "subjects": []}  # fmt: skip


def run(model: Any, asked: Asked, loaded: Loaded) -> dict[str, Any]:
    """Ask ``model`` (lm-eval's LM): JSON values by task, in the order in which they were named.

    A task has its ``metric``, the ``value`` and its standard error, ``shots``, all ``figures`` of lm-eval's, and
    ``questions``: what each was worth, by the digest of the question and its prompt; a figure that is not one of
    questions (perplexity) has none. Raises UsageError where a task cannot be asked of this model.
    """
    from lm_eval import simple_evaluate

    with _quiet():
        found = simple_evaluate(
            model, tasks=[task for tasks in loaded.tasks.values() for task in tasks], task_manager=loaded.manager,
            limit=asked.limit, log_samples=True, confirm_run_unsafe_code=asked.allow_code,
        )  # fmt: skip
    names = {entry.task: [task.task_name for task in loaded.tasks[entry.task]] for entry in asked.entries}
    return {entry.task: _result(entry, names[entry.task], found) for entry in asked.entries}


def load(asked: Asked) -> Loaded:
    """The tasks with their questions, before any model is there; raises UsageError, InputError, MissingDependency."""
    from minitron_build.evaluate.tasks import sandbox
    from minitron_build.evaluate.tasks.questions import local_task

    manager = _manager(asked.include)
    of_data = local_task(asked.data)
    loaded = {}
    for entry in asked.entries:
        settings: dict[str, Any] = {"class": of_data}
        if entry.shots is not None:
            settings["num_fewshot"] = entry.shots
        try:
            with _quiet():
                members = [member | settings for member in _members(manager.task_index, entry.task)]
                tasks = list(manager.load({"group": "minitron", "task": members})["tasks"].values())
        except MinitronError:
            raise
        except Exception as error:  # what lm-eval stumbles over in questions that have other columns
            raise InputError(f"{entry.task} cannot be asked: {type(error).__name__}: {error}") from error
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
            if not asked.allow_code:
                raise UsageError(
                    f"{entry.task} runs programs that the model writes; allow it with --allow-code, or leave it out"
                )
            sandbox.sandbox()
        loaded[entry.task] = tasks
    return Loaded(manager, loaded)


@functools.cache
def _manager(include: Path | None) -> Any:
    """lm-eval's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    own = Path(__file__).parent / "lm_eval"
    with _quiet():
        return TaskManager(include_path=[str(own), *([str(include)] if include else [])])


def _members(index: Any, name: str) -> Iterator[dict[str, Any]]:
    """The tasks that a name stands for, each with what its group changes in it.

    Groups are taken apart here: given to lm-eval with settings, they would name all their tasks alike.
    """
    if name not in index:
        raise UsageError(f"lm-eval has no task {name!r}; your own are found in the folder that --include names")
    kind = index[name].kind.name
    if kind == "GROUP":
        for child in index[name].cfg["task"]:
            changes = dict(child) if isinstance(child, dict) else {"task": child}
            for member in _members(index, changes.pop("task", None) or changes.pop("group")):
                yield changes | member
    elif kind == "TAG":
        for one in sorted(index[name].tags):
            yield {"task": one}
    else:
        yield {"task": name}


def _result(entry: SuiteTask, names: Sequence[str], found: Any) -> dict[str, Any]:
    """One entry's values, of all tasks that it stands for: each question counts alike."""
    figures = {name: _figures(found["results"][name]) for name in names}
    samples = [sample for name in names for sample in found["samples"][name]]
    metric = entry.metric_of([name for name in samples[0]["metrics"] if _is_figure(samples[0][name])])
    kept = entry.filter or samples[0]["filter"]
    questions = _questions([sample for sample in samples if sample["filter"] == kept], metric) if metric else {}
    count = len({(name, sample["doc_id"]) for name in names for sample in found["samples"][name]})
    result = {"metric": metric, "shots": found["n-shot"][names[0]], "count": count}
    if metric:
        values = list(questions.values())
        mean = sum(values) / len(values)
        deviation = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        result |= {"value": mean, "standard_error": (deviation / len(values)) ** 0.5}
    return result | {"figures": figures, "questions": questions}


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in _NO_METRIC and value != "N/A"}


def _questions(samples: Sequence[Any], metric: str) -> dict[str, float]:
    """What each question was worth; one that is asked twice has two digests."""
    found: dict[str, float] = {}
    for sample in samples:
        digest = hashlib.sha256(f"{sample['doc_hash']}{sample['prompt_hash']}".encode()).hexdigest()[:16]
        while digest in found:
            digest += "+"
        found[digest] = float(sample[metric])
    return found


def _is_figure(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (hasattr(value, "dtype") and value.ndim == 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's advice and its bars to itself; --debug shows them."""
    import datasets
    import lm_eval.api.task as bars

    logger, level, bar = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, bars.tqdm
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        bars.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        logger.setLevel(level)
        bars.tqdm = bar
