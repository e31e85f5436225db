"""One HTML page of an evaluation: its figures, verdicts and plots. It needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from minitron.svg import Bar, intervals
from minitron_build.evaluate.tasks.gate import Verdict
from minitron_build.evaluate.tasks.statistics import Z


def render(
    document: Mapping[str, Any],
    verdicts: Mapping[str, Sequence[Verdict]],
    baseline: str | None,
    tolerance: float | None,
) -> str:
    """The page of a run, with the verdicts on each subject by its name, where there was a baseline."""
    template = (resources.files("minitron_build.evaluate.tasks") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    plots = [_values(document), *(_differences(name, found, tolerance or 0.0) for name, found in verdicts.items())]
    return environment.from_string(template).render(
        run=document, verdicts=verdicts, baseline=baseline, tolerance=tolerance, plots=[*map(Markup, plots)]
    )


def _values(document: Mapping[str, Any]) -> str:
    """Every task that has a figure of questions, with the interval that its standard error gives."""
    bars = []
    for subject in document["subjects"]:
        for name, task in subject["tasks"].items():
            if task["metric"]:
                value, half = task["value"], Z * task["standard_error"]
                bars.append(Bar(name, value - half, value, value + half, subject["name"]))
    return intervals("What was reached, with 95 % intervals", "share, or the task's own figure", bars)


def _differences(name: str, found: Sequence[Verdict], tolerance: float) -> str:
    bars = [Bar(one.task, one.difference.low, one.difference.value, one.difference.high, one.outcome)
            for one in found if one.difference is not None]  # fmt: skip
    return intervals(
        f"{name} less the baseline", "difference, with 95 % intervals", bars, [(-tolerance, "tolerance"), (0.0, "")]
    )
