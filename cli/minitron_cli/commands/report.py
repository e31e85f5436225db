"""``minitron report``: finished load tests as a table, JSON, CSV and one HTML page, several beside each other."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron import files
from minitron.console import emit_json, table
from minitron.errors import UsageError
from minitron_client.bench.record import METRICS
from minitron_client.bench.statistics import remark, shown
from minitron_client.report import page, reading
from minitron_client.report.comparison import Difference, compare
from minitron_client.report.reading import Run

SCHEMA = 1
_PAGE = "report.html"
_COLUMNS = ("run", "index", "intended_ms", "send_lateness_ms", "ttft_intended_ms", "ttft_ms", "tpot_ms", "e2e_ms",
            "input_tokens", "output_tokens", "outcome", "in_window")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a load test; slices in one folder are put together"
    )
    add("--html", type=Path, metavar="FILE", help=f"where to write the page (default: {_PAGE} in the first RUN)")
    add("--csv", type=Path, metavar="FILE", help="write one row per request")
    add("--json", action="store_true", help="print figures and differences as JSON")


def run(args: argparse.Namespace) -> int:
    """Read, compare, write, print."""
    runs = [reading.read(folder) for folder in args.runs]
    loads = [one for one in runs if one.kind == "load"]
    differences = [(one, compare(loads[0], one)) for one in loads[1:]]
    html = args.html or args.runs[0] / _PAGE
    files.write_text(html, page.render(runs, differences))
    if args.csv:
        if not loads:
            raise UsageError("--csv writes requests, and none of the runs is a load test")
        files.write_text(args.csv, _csv(loads))
    if args.json:
        emit_json(_document(runs, differences))
        return 0
    if loads:
        print(_figures(loads))
    for one, rows in differences:
        print(f"\n{one.name} beside {loads[0].name}")
        print(_differences(rows))
    print(f"page: {html}")
    return 0


def _figures(runs: Sequence[Run]) -> str:
    """A column for each run."""
    rows = [["requests sent", *(str(one.document["summary"]["sent"]) for one in runs)]]
    for name, key, form in (("requests/s", "requests_per_s", ".2f"), ("tokens/s", "output_tokens_per_s", ".1f"),
                            ("goodput/s", "goodput_per_s", ".2f"), ("error rate", "error_rate", ".2%")):  # fmt: skip
        rows.append([name, *(_cell(one.document["summary"].get(key), form) for one in runs)])
    for metric in ("ttft_intended", "itl", "tpot", "e2e_intended", "send_lateness"):
        for share in ("p50", "p99"):
            found = [one.document["summary"]["latency_ms"].get(metric) for one in runs]
            rows.append(
                [f"{METRICS[metric].label} {share} ms", *("" if one is None else shown(one[share]) for one in found)]
            )
    return "\n".join([table(rows, ["", *(one.name for one in runs)]), *remark(rows)])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _differences(rows: Sequence[Difference]) -> str:
    cells = [
        [f"{one.metric} p{one.share} ms", f"{one.first.value:.2f}", f"{one.second.value:.2f}", f"{one.ratio.value:.3f}",
         f"{one.ratio.low:.3f}..{one.ratio.high:.3f}", "real" if one.real else "within the noise"]
        for one in rows
    ]  # fmt: skip
    return table(cells, ["", "first", "second", "ratio", "95 %", "difference"])


def _document(runs: Sequence[Run], differences: Sequence[tuple[Run, list[Difference]]]) -> dict[str, Any]:
    return {
        "kind": "report", "schema": SCHEMA,
        "runs": [{"name": one.name} | {key: value for key, value in one.document.items() if key != "state"}
                 for one in runs],  # runs of the first version hold the state of their histograms
        "differences": [{"run": one.name, "beside": runs[0].name,
                         "figures": [asdict(row) | {"real": row.real} for row in rows]} for one, rows in differences],
    }  # fmt: skip


def _csv(runs: Sequence[Run]) -> str:
    """One row per request, times in ms; what cannot be computed is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in runs:
        for record in one.records:
            timing = record.timing
            times = (record.intended_ns, record.lateness_ns, record.intended_timing.ttft_ns, timing.ttft_ns,
                     timing.tpot_ns, timing.e2e_ns)  # fmt: skip
            writer.writerow([
                one.name, record.index, *("" if value is None else f"{value / 1e6:.3f}" for value in times),
                record.input_tokens, timing.output_tokens, record.outcome, int(one.window.holds(record.intended_ns)),
            ])  # fmt: skip
    return text.getvalue()
