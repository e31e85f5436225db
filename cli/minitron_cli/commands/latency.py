"""``minitron latency``: TTFT, ITL, TPOT, E2E and tokens/s with confidence intervals over a small grid."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minitron import files
from minitron.console import emit_json, table
from minitron.errors import UsageError, VerdictError
from minitron.version import VERSION
from minitron_client.bench import compare, latency
from minitron_client.bench.gone import failure
from minitron_client.bench.latency import FIXED_LENGTH, SCHEMA, Effort, Point, PointResult
from minitron_client.bench.pauses import scheduling
from minitron_client.bench.prompts import found_tokenizer, prompt_maker
from minitron_client.bench.statistics import Estimate, remark, shown
from minitron_client.client.arguments import add_connection, client_of, endpoint_of_any_kind
from minitron_client.client.dialect import ServedModel

log = logging.getLogger(__name__)

_DEFAULT_GRID = ("32:32:1", "32:32:4")
_NAMES = {"ttft_ms": "TTFT ms", "itl_ms": "ITL ms", "tpot_ms": "TPOT ms", "e2e_ms": "E2E ms"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--grid", nargs="+", default=list(_DEFAULT_GRID), metavar="INPUT:OUTPUT:CONCURRENCY",
        help=f"points to measure, in tokens and streams (default {' '.join(_DEFAULT_GRID)})")  # fmt: skip
    add("--repeats", type=int, default=Effort.repeats, metavar="N", help="repeats per point (default %(default)s)")
    add("--rounds", type=int, default=Effort.rounds, metavar="N",
        help="requests per stream and repeat (default %(default)s)")  # fmt: skip
    add("--warm-up", type=int, default=Effort.warm_up, metavar="N",
        help="requests before each point that do not count (default %(default)s)")  # fmt: skip
    add("--deadline", type=float, metavar="SECONDS", help="give a request up after so long")
    add("--seed", type=int, default=0, help="another seed, other prompts (default %(default)s)")
    add("--tokenizer", type=Path, metavar="DIR",
        help="the served tokenizer's folder (default: the manifest's; without one the server counts)")  # fmt: skip
    add("--manifest", type=Path, metavar="DIR", help="engine or repository whose plan gives the roofline")
    add("--beside", type=Path, metavar="RUN", help="stored 16-bit run to print the ratio to")
    add("--baseline", type=Path, metavar="RUN", help="stored run that this one must not be worse than (exit code 8)")
    add("--tolerance", type=float, default=0.1, metavar="SHARE", help="how much worse is allowed (default %(default)s)")
    add("--output", type=Path, metavar="FILE", help="store the result as JSON")
    add("--json", action="store_true", help="print the result as JSON")
    add_connection(parser, http=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print, compare."""
    points = [Point.parse(text) for text in args.grid]
    if min(args.repeats, args.rounds) < 1 or args.warm_up < 0:
        raise UsageError("--repeats and --rounds must be at least 1, --warm-up at least 0")
    roofline = compare.read_roofline(args.manifest) if args.manifest else None
    beside = compare.read_run(args.beside) if args.beside else None
    baseline = compare.read_run(args.baseline) if args.baseline else None
    server = endpoint_of_any_kind(args)
    effort = Effort(args.repeats, args.rounds, args.warm_up, args.deadline)
    with client_of(server, args.model) as client:
        model, metadata = client.served_model(), client.metadata()
        prompts, counted_by = prompt_maker(client, model, args.tokenizer or found_tokenizer(args.manifest), args.seed)
        results, gone = asyncio.run(
            latency.measure(server, model, points, prompts=prompts, effort=effort, progress=log.info)
        )
    document = _document(args, model, results) | {
        "server_version": metadata.get("version"), "prompt_tokens_counted_by": counted_by,
        "roofline": vars(roofline) if roofline else None, "server_gone": gone,
    }  # fmt: skip
    if args.output:
        files.write_text(args.output, json.dumps(document, indent=1) + "\n")
    if args.json:
        emit_json(document)
    else:
        print(_table(results, roofline, compare.speedups(results, beside) if beside else {}))
        print("\n".join(_remarks(args, results, counted_by, roofline)))
    if gone:
        raise failure(gone)
    return _verdict(results, baseline, args.tolerance)


def _document(args: argparse.Namespace, model: ServedModel, results: Sequence[PointResult]) -> dict[str, Any]:
    return {
        "kind": "latency", "schema": SCHEMA, "toolkit": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "scheduling": scheduling()},
        "url": args.url, "model": model.name, "dialect": model.dialect,
        "lengths": FIXED_LENGTH, "seed": args.seed,
        "repeats": args.repeats, "rounds": args.rounds, "warm_up": args.warm_up,
        "intervals": "95 %: bootstrap over repeats and requests for percentiles, Student's t over repeats for tokens/s",
        "points": [one.document() for one in results],
    }  # fmt: skip


def _table(results: Sequence[PointResult], roofline: compare.Roofline | None, ratios: dict[Point, float]) -> str:
    head = ["in", "out", "streams", "metric", "p50", "95 %", "p90", "95 %", "p99", "95 %", "values"]
    extra = (["roofline"] if roofline else []) + (["x 16-bit"] if ratios else [])
    rows: list[list[str]] = []
    for one in results:
        point = [str(one.point.input_tokens), str(one.point.output_tokens), str(one.point.concurrency)]
        for name, shares in one.metrics.items():
            cells = [cell for share in shares.values() for cell in _cells(share)]
            rows.append([*point, _NAMES[name], *cells, str(one.counts[name]), *([""] * len(extra))])
        if one.tokens_per_s:
            last = [f"{roofline.tokens_per_s(one.point.concurrency):.0f}"] if roofline else []
            last += [f"{ratios[one.point]:.2f}" if one.point in ratios else ""] if ratios else []
            rate = [f"{one.tokens_per_s.value:.1f}", _cells(one.tokens_per_s)[1]]
            rows.append([*point, "tokens/s", *rate, "", "", "", "", str(one.requests), *last])
    return "\n".join([table(rows, head + extra), *remark(rows)])


def _cells(estimate: Estimate | None) -> tuple[str, str]:
    """A figure and its interval, which one repeat does not give."""
    if estimate is None:
        return shown(None), ""
    return shown(estimate.value), "" if estimate.low is None else f"{estimate.low:.2f}..{estimate.high:.2f}"


def _remarks(
    args: argparse.Namespace, results: Sequence[PointResult], counted_by: str, roofline: compare.Roofline | None
) -> list[str]:
    lines = [f"Fixed lengths: {FIXED_LENGTH}. Prompt tokens were counted by {counted_by}. 'values' counts requests for "
             "tokens/s (a mean)."]  # fmt: skip
    if not all(one.metrics.get("tpot_ms") or one.point.output_tokens == 1 for one in results):
        lines.append("The server counted no tokens, so there are no token metrics.")
    for one in results:
        name = f"{one.point.input_tokens}:{one.point.output_tokens}:{one.point.concurrency}"
        if one.failures:
            lines.append(f"{name}: of {one.requests} requests failed " + ", ".join(
                f"{count} ({kind})" for kind, count in one.failures.items()))  # fmt: skip
        if one.input_tokens and set(one.input_tokens) != {one.point.input_tokens}:
            lines.append(f"{name}: the server counted {one.input_tokens[0]} to {one.input_tokens[1]} prompt tokens")
    if args.manifest and roofline is None:
        lines.append(f"The plan in {args.manifest} has no roofline.")
    if roofline and "weight_only" in roofline.precision and args.beside is None:
        lines.append("no 16-bit baseline (--beside RUN gives one)")
    return lines


def _verdict(results: Sequence[PointResult], baseline: dict[str, Any] | None, tolerance: float) -> int:
    failed = sum(sum(one.failures.values()) for one in results)
    if failed:
        raise VerdictError(f"{failed} of {sum(one.requests for one in results)} requests failed, see the result")
    if baseline is None:
        return 0
    worse = compare.regressions(results, baseline, tolerance)
    if worse:
        raise VerdictError(f"worse than the baseline by more than {tolerance:.0%}: {'; '.join(worse)}")
    print(f"not worse than the baseline by more than {tolerance:.0%}", file=sys.stderr)
    return 0
