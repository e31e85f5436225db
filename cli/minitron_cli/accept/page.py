"""The result of an acceptance as one JSON document, one table and one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from minitron import console, files
from minitron.acceptance import FAIL, PASS, SKIPPED, Line, catalogue
from minitron.version import VERSION

SCHEMA = 1


def document(
    lines: Sequence[Line], about: Mapping[str, Any], seconds: Mapping[str, float | None], numbers: Mapping[str, float]
) -> dict[str, Any]:
    """All that the page and programs need, lines in the catalogue's order; ``seconds`` of each finished step."""
    places = {name: place for place, name in enumerate(catalogue())}
    return {
        "kind": "acceptance", "schema": SCHEMA, "toolkit": VERSION, **about,
        "verdict": verdict(lines), "counts": {status: _count(lines, status) for status in (PASS, FAIL, SKIPPED)},
        "seconds": dict(seconds), "numbers": dict(numbers),
        "lines": [
            {
                "id": line.id, "step": line.entry.step, "status": line.status, "what": line.entry.what,
                "evidence": line.evidence, "remedy": line.entry.remedy if line.status == FAIL else "",
            }
            for line in sorted(lines, key=lambda line: places[line.id])
        ],
    }  # fmt: skip


def verdict(lines: Sequence[Line]) -> str:
    """PASS where no line failed, FAIL where one did; ``unfinished`` is said by whoever stopped before the end."""
    return FAIL if any(line.status == FAIL for line in lines) else PASS


def _count(lines: Sequence[Line], status: str) -> int:
    return sum(line.status == status for line in lines)


def write(folder: Path, whole: Mapping[str, Any]) -> None:
    """``acceptance.json`` and ``acceptance.html`` in ``folder``."""
    files.write_text(folder / "acceptance.json", json.dumps(whole, indent=1) + "\n")
    evidence = sorted(path.name for path in (folder / "evidence").iterdir() if path.is_file())
    files.write_text(folder / "acceptance.html", html(whole, evidence))


def html(whole: Mapping[str, Any], evidence: Sequence[str]) -> str:
    """The page; ``evidence``: names of the files beside it that it links to."""
    import jinja2

    template = (resources.files("minitron_cli.accept") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(d=whole, evidence=evidence)


def text(whole: Mapping[str, Any]) -> str:
    """The table for people, then each failed line with what to do."""
    rows = [(line["status"], line["id"], _short(line["evidence"])) for line in whole["lines"]]
    failed = [
        f"\n{line['id']}: {line['evidence']}\n  what to do: {line['remedy']}"
        for line in whole["lines"]
        if line["remedy"]
    ]
    counts = ", ".join(f"{count} {status}" for status, count in whole["counts"].items())
    return "\n".join([console.table(rows, ("", "line", "evidence")), *failed, f"\n{whole['verdict']}: {counts}"])


def _short(evidence: str, width: int = 110) -> str:
    return evidence if len(evidence) <= width else evidence[: width - 1] + "…"
