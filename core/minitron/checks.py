"""A check that was made: what was asked, PASS, FAIL or SKIPPED, with what evidence.

Every judge, of whatever room, returns these, and ``minitron accept`` is what calls the judges. What a check asks and
what its FAIL means for the user stand in data/acceptance.yaml only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minitron import data_files, files
from minitron.errors import InputError

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


@dataclass(frozen=True)
class CatalogueEntry:
    """A check as the catalogue has it; ``question``: whether this holds, as the sentence that a PASS affirms.

    ``step``: of an acceptance, which makes it. ``gpu``: only a GPU target can show it.
    """

    name: str
    step: str
    question: str
    remedy: str
    gpu: bool = False


@dataclass(frozen=True)
class Check:
    """One check that was made: ``evidence`` says in a sentence what was seen, or why nothing was."""

    name: str
    verdict: str
    evidence: str

    @property
    def step(self) -> str:
        """The step that it belongs to."""
        return catalogue()[self.name].step

    @property
    def question(self) -> str:
        """What was asked."""
        return catalogue()[self.name].question

    @property
    def remedy(self) -> str:
        """What to do, where it failed."""
        return catalogue()[self.name].remedy if self.verdict == FAIL else ""

    def document(self) -> dict[str, str]:
        """As it is stored."""
        return {"id": self.name, "status": self.verdict, "evidence": self.evidence}

    @classmethod
    def of(cls, document: Mapping[str, str]) -> Check:
        """What ``document`` gave; raises KeyError, TypeError."""
        return cls(document["id"], document["status"], document["evidence"])


@cache
def catalogue() -> dict[str, CatalogueEntry]:
    """Every check that there is, in the order of the report."""
    return {name: CatalogueEntry(name, **entry) for name, entry in data_files.load("acceptance.yaml").items()}


def of_step(step: str) -> list[CatalogueEntry]:
    """The checks of a step."""
    return [entry for entry in catalogue().values() if entry.step == step]


def judge(name: str, problems: Sequence[str], evidence: str) -> Check:
    """PASS with ``evidence``, or FAIL with what is wrong."""
    shown = "; ".join(problems[:_MOST_PROBLEMS])
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return Check(name, FAIL, shown + more) if problems else Check(name, PASS, evidence)


_MOST_PROBLEMS = 8


def store(path: Path, checks: Sequence[Check], **more: Any) -> None:
    """Write checks, and what else belongs to them, as one JSON document."""
    files.write_text(path, json.dumps(more | {"lines": [check.document() for check in checks]}, indent=1) + "\n")


def read(path: Path) -> tuple[list[Check], Mapping[str, Any]]:
    """The checks of a stored document, and the document; raises InputError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [Check.of(check) for check in document["lines"]], document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as evidence ({error})") from error
