"""A line of an acceptance: what was held, PASS, FAIL or SKIPPED, with what evidence.

Commands that judge something (``probe``, ``audit``, ``tokens``, ``conformance``) end in ``report``; ``accept`` reads
the documents they leave. What a line says and what its FAIL means stand in data/acceptance.yaml only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minitron import console, data_files, files
from minitron.errors import InputError, VerdictError

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue; ``gpu``: only a GPU target can show it."""

    id: str
    step: str
    what: str
    remedy: str
    gpu: bool = False


@dataclass(frozen=True)
class Line:
    """One judgement: ``evidence`` says in a sentence what was seen, or why nothing was."""

    id: str
    status: str
    evidence: str

    @property
    def entry(self) -> Entry:
        """What the catalogue says of it."""
        return catalogue()[self.id]


@cache
def catalogue() -> dict[str, Entry]:
    """Every line that there is, in the order of the report."""
    return {name: Entry(name, **entry) for name, entry in data_files.load("acceptance.yaml").items()}


def of_step(step: str) -> list[Entry]:
    """The lines that a step judges."""
    return [entry for entry in catalogue().values() if entry.step == step]


def judge(name: str, problems: Sequence[str], evidence: str) -> Line:
    """PASS with ``evidence``, or FAIL with what is wrong."""
    shown = "; ".join(problems[:_MOST_PROBLEMS])
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return Line(name, FAIL, shown + more) if problems else Line(name, PASS, evidence)


_MOST_PROBLEMS = 8


def report(lines: Sequence[Line], *, to: Path | None, as_json: bool, **document: Any) -> int:
    """Store the lines (and what else belongs to them) at ``to``, print them, and return 0, or 8 where one failed."""
    whole = document | {"lines": [asdict(line) for line in lines]}
    if to:
        files.write_text(to, json.dumps(whole, indent=1) + "\n")
    if as_json:
        console.emit_json(whole)
    else:
        print(table(lines))
    return VerdictError.exit_code if any(line.status == FAIL for line in lines) else 0


def table(lines: Sequence[Line]) -> str:
    """For people: status, line and evidence."""
    return console.table([(line.status, line.id, line.evidence) for line in lines], ("", "line", "evidence"))


def read(path: Path) -> tuple[list[Line], Mapping[str, Any]]:
    """The lines of a stored document, and the document; raises InputError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [Line(**line) for line in document["lines"]], document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as evidence ({error})") from error
