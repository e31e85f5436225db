"""Where tasks take their questions from: JSON lines in a folder, in the dataset's own columns; never the network.

The questions of a dataset ``NAME`` (of its configuration ``CONFIG``, where a task names one) lie at
``DIR/NAME/CONFIG/SPLIT.jsonl``, as ``DIR/openai/gsm8k/main/test.jsonl``. Prompts, answers and metrics are lm-eval's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Before the packages are imported, which read it then.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import datasets
from lm_eval.api.task import ConfigurableTask

from minitron import files
from minitron.errors import InputError, UsageError

#: lm-eval's names of splits in a task's configuration, the one that is asked first.
_ASKED = ("test_split", "validation_split")
_SHOWN = ("fewshot_split", "training_split", "validation_split", "test_split")
#: Loaders of files, which a task of the user's own names instead of a dataset.
_OWN_FILES = ("json", "csv", "text", "parquet")


def local_task(folder: Path | None) -> type[ConfigurableTask]:
    """lm-eval's class of tasks, with its questions from ``folder``; a task that names its own files has them."""

    class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is not always installed
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if self.config.dataset_path in _OWN_FILES:
                super().download(dataset_kwargs, **kwargs)
            elif folder is None:
                dataset = self.config.dataset_path
                raise UsageError(f"{self.config.task} asks questions of {dataset}; say with --data where they lie")
            else:
                self.dataset = _splits(self.config, folder)

    return LocalTask


def _splits(config: Any, folder: Path) -> Any:
    """The splits that a task asks and shows; a split that it has no need of may be missing."""
    place = folder.joinpath(*filter(None, (config.dataset_path, config.dataset_name)))
    asked = next(split for name in _ASKED if (split := config[name]))
    shown = next(split for name in _SHOWN if (split := config[name]))
    needed = {asked, shown} if config.num_fewshot else {asked}
    found = datasets.DatasetDict()
    for name in (*_ASKED, *_SHOWN):
        split = config[name]
        if split is None or split in found:
            continue
        path = place / f"{split}.jsonl"
        if path.is_file():
            found[split] = datasets.Dataset.from_list(_lines(path))
        elif split in needed:
            raise InputError(
                f"{config.task} needs {path}, which is not there; docs/evaluation.md says where it comes from"
            )
        else:
            config[name] = None
    if config.num_fewshot and len(found[shown]) < config.num_fewshot + (shown == asked):
        raise InputError(
            f"{place / shown}.jsonl holds {len(found[shown])} examples, and {config.num_fewshot} are shown"
        )
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} holds no JSON object")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no question")
    return rows
