"""One HTML page with everything in it: tables, plots, configuration. It needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from minitron.svg import Series, plot
from minitron_client.bench.record import METRICS, OK, Record
from minitron_client.bench.statistics import TOO_FEW, shown
from minitron_client.report.comparison import Difference
from minitron_client.report.reading import Run

_MOST_POINTS = 1500
_CDF_POINTS = 200


def render(runs: Sequence[Run], differences: Sequence[tuple[Run, list[Difference]]] = ()) -> str:
    """The page of one or more runs; ``differences`` of each further run from the first."""
    template = (resources.files("minitron_client.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    loads = [run for run in runs if run.kind == "load"]
    plots = [*map(_sweep, (run for run in runs if run.kind == "capacity")), *(_plots(loads) if loads else [])]
    return environment.from_string(template).render(
        runs=runs, loads=loads, differences=differences, flat=_flat, shown=shown, too_few=TOO_FEW,
        labels={name: metric.label for name, metric in METRICS.items()},
        plots=[*map(Markup, plots)],
    )  # fmt: skip


def _plots(runs: Sequence[Run]) -> list[str]:
    stalls = [(stall["at_s"], "stall") for run in runs for stall in run.document["stalls"]]
    return [
        plot("TTFT, cumulative, from the intended send", "ms", "share of requests",
             [_cdf(run, METRICS["ttft_intended"].values) for run in runs], log_x=True),
        plot("ITL, cumulative", "ms", "share of responses",
             [_cdf(run, METRICS["itl"].values) for run in runs], log_x=True),
        plot("E2E, cumulative, from the intended send", "ms", "share of requests",
             [_cdf(run, METRICS["e2e_intended"].values) for run in runs], log_x=True),
        plot("TTFT over time", "s after the start", "ms",
             [_over_time(run, METRICS["ttft_intended"].values) for run in runs], marks=stalls),
        plot("ITL over time (mean of each request)", "s after the start", "ms",
             [_over_time(run, lambda one: [float(np.mean(one.timing.itl_ns))] if one.timing.itl_ns else [])
              for run in runs], marks=stalls),
        plot("Output tokens per second", "s after the start", "tokens/s", [_tokens(run) for run in runs], marks=stalls),
        plot("Requests in flight", "s after the start", "requests", [_in_flight(run) for run in runs], marks=stalls),
    ]  # fmt: skip


def _succeeded(run: Run) -> list[Record]:
    return [record for record in run.records if record.outcome == OK]


def _cdf(run: Run, values: Callable[[Record], Sequence[float]]) -> Series:
    inside = (record for record in _succeeded(run) if run.window.holds(record.intended_ns))
    ordered = np.sort([value / 1e6 for record in inside for value in values(record)])
    if not len(ordered):
        return Series(run.name, [], [])
    picked = np.unique(np.linspace(0, len(ordered) - 1, _CDF_POINTS).astype(int))
    return Series(run.name, ordered[picked].tolist(), ((picked + 1) / len(ordered)).tolist())


def _over_time(run: Run, values: Callable[[Record], Sequence[float]]) -> Series:
    pairs = [(record.intended_ns / 1e9, value / 1e6) for record in _succeeded(run) for value in values(record)]
    pairs = pairs[:: max(len(pairs) // _MOST_POINTS, 1)]
    return Series(run.name, [x for x, _ in pairs], [y for _, y in pairs], dots=True)


def _tokens(run: Run) -> Series:
    """Tokens of each whole second."""
    per_second: dict[int, int] = {}
    for record in run.records:
        for time_ns, count in record.responses:
            per_second[time_ns // 10**9] = per_second.get(time_ns // 10**9, 0) + (count or 0)
    seconds = range(max(per_second, default=-1) + 1)
    return _thinned(run.name, list(seconds), [per_second.get(second, 0) for second in seconds])


def _in_flight(run: Run) -> Series:
    steps = sorted([(one.sent_ns, 1) for one in run.records] + [(one.ended_ns, -1) for one in run.records])
    levels = np.cumsum([step for _, step in steps]).tolist() if steps else []
    return _thinned(run.name, [time_ns / 1e9 for time_ns, _ in steps], levels)


def _thinned(name: str, xs: list[float], ys: list[float]) -> Series:
    every = max(len(xs) // _MOST_POINTS, 1)
    return Series(name, xs[::every], ys[::every])


def _sweep(run: Run) -> str:
    """Throughput against latency over the rates of a search, its knee marked."""
    tried = sorted(run.document["runs"], key=lambda one: float(one["rate"]))
    rows = [(one["summary"]["requests_per_s"], one["summary"]["latency_ms"].get("ttft_intended")) for one in tried]
    series = []
    for share in ("p50", "p99"):
        points = [(rate, ttft[share]) for rate, ttft in rows if rate and ttft and ttft[share] is not None]
        series.append(Series(f"TTFT {share}", [rate for rate, _ in points], [value for _, value in points]))
    return plot("Latency against throughput", "requests/s completed", "TTFT ms, from the intended send", series,
                marks=[(run.document["capacity_per_s"], "capacity")])  # fmt: skip


def _flat(document: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as (path, value) rows."""
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows
