"""The result of an acceptance as one JSON document, one table and one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from minitron import console, files
from minitron.checks import FAIL, PASS, SKIPPED, Check, catalogue
from minitron.version import VERSION

SCHEMA = 1


def document(
    checks: Sequence[Check], about: Mapping[str, Any], seconds: Mapping[str, float | None], numbers: Mapping[str, float]
) -> dict[str, Any]:
    """All that the page and programs need, checks in the catalogue's order; ``seconds`` of each finished step."""
    places = {name: place for place, name in enumerate(catalogue())}
    return {
        "kind": "acceptance", "schema": SCHEMA, "toolkit": VERSION, **about,
        "verdict": FAIL if _count(checks, FAIL) else PASS,
        "counts": {verdict: _count(checks, verdict) for verdict in (PASS, FAIL, SKIPPED)},
        "seconds": dict(seconds), "numbers": dict(numbers),
        "lines": [
            {
                "id": check.name, "step": check.step, "status": check.verdict, "what": check.question,
                "evidence": check.evidence, "remedy": check.remedy,
            }
            for check in sorted(checks, key=lambda check: places[check.name])
        ],
    }  # fmt: skip


def _count(checks: Sequence[Check], verdict: str) -> int:
    return sum(check.verdict == verdict for check in checks)


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """``acceptance.json`` and ``acceptance.html`` in ``folder``."""
    files.write_text(folder / "acceptance.json", json.dumps(report, indent=1) + "\n")
    evidence = sorted(path.name for path in (folder / "evidence").iterdir() if path.is_file())
    files.write_text(folder / "acceptance.html", html(report, evidence))


def html(report: Mapping[str, Any], evidence: Sequence[str]) -> str:
    """The page; ``evidence``: names of the files beside it that it links to."""
    import jinja2

    template = (resources.files("minitron_cli.accept") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(d=report, evidence=evidence)


def text(report: Mapping[str, Any]) -> str:
    """The table for people, then each failed line with what to do."""
    rows = [(line["status"], line["id"], _short(line["evidence"])) for line in report["lines"]]
    failed = [
        f"\n{line['id']}: {line['evidence']}\n  what to do: {line['remedy']}"
        for line in report["lines"]
        if line["remedy"]
    ]
    counts = ", ".join(f"{count} {status}" for status, count in report["counts"].items())
    return "\n".join([console.table(rows, ("", "check", "evidence")), *failed, f"\n{report['verdict']}: {counts}"])


def _short(evidence: str, width: int = 110) -> str:
    return evidence if len(evidence) <= width else evidence[: width - 1] + "…"
