"""Results of a bench for people: tables, and the lines that say what the tables mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minitron.console import table
from minitron_client.bench.compare import Roofline
from minitron_client.bench.grid import BenchPoint, BenchPointResult
from minitron_client.bench.profile import FIXED_LENGTH, Profile
from minitron_client.bench.record import METRICS
from minitron_client.bench.schedule import ScheduledRequest, ScheduleSlice
from minitron_client.bench.statistics import Estimate, remark, shown


def grid_table(
    results: Sequence[BenchPointResult], roofline: Roofline | None, ratios: Mapping[BenchPoint, float]
) -> str:
    """Percentiles of each point with their intervals; ``ratios``: tokens/s by those of another run."""
    columns = ["in", "out", "streams", "metric", "p50", "95 %", "p90", "95 %", "p99", "95 %", "values"]
    extra = (["roofline"] if roofline else []) + (["x 16-bit"] if ratios else [])
    rows: list[list[str]] = []
    for one in results:
        point = [str(one.point.input_tokens), str(one.point.output_tokens), str(one.point.concurrency)]
        for name, shares in one.metrics.items():
            cells = [cell for share in shares.values() for cell in _cells(share)]
            label = f"{METRICS[name.removesuffix('_ms')].label} ms"
            rows.append([*point, label, *cells, str(one.counts[name]), *([""] * len(extra))])
        if one.tokens_per_s:
            last = [f"{roofline.tokens_per_s(one.point.concurrency):.0f}"] if roofline else []
            last += [f"{ratios[one.point]:.2f}" if one.point in ratios else ""] if ratios else []
            rate = [f"{one.tokens_per_s.value:.1f}", _cells(one.tokens_per_s)[1]]
            rows.append([*point, "tokens/s", *rate, "", "", "", "", str(one.requests), *last])
    return "\n".join([table(rows, columns + extra), *remark(rows)])


def _cells(estimate: Estimate | None) -> tuple[str, str]:
    """A figure and its interval, which one repeat does not give."""
    if estimate is None:
        return shown(None), ""
    return shown(estimate.value), "" if estimate.low is None else f"{estimate.low:.2f}..{estimate.high:.2f}"


def grid_remarks(results: Sequence[BenchPointResult], counted_by: str) -> list[str]:
    """What was measured, and what was not as it should be."""
    lines = [f"Fixed lengths: {FIXED_LENGTH}. Prompt tokens were counted by {counted_by}. 'values' counts requests for "
             "tokens/s (a mean)."]  # fmt: skip
    if not all(one.metrics.get("tpot_ms") or one.point.output_tokens == 1 for one in results):
        lines.append("The server counted no tokens, so there are no token metrics.")
    for one in results:
        if one.failures:
            kinds = ", ".join(f"{count} ({kind})" for kind, count in one.failures.items())
            lines.append(f"{one.point.name}: of {one.requests} requests failed {kinds}")
        if one.input_tokens and set(one.input_tokens) != {one.point.input_tokens}:
            lines.append(
                f"{one.point.name}: the server counted {one.input_tokens[0]} to {one.input_tokens[1]} prompt tokens"
            )
    return lines


def load_text(document: Mapping[str, Any]) -> str:
    """The result of a load: a table of latencies, and lines."""
    summary = document["summary"]
    rows = [[METRICS[name].label, *map(shown, shares.values())] for name, shares in summary["latency_ms"].items()]
    return "\n".join([table(rows, ["ms", "p50", "p90", "p99"]), *remark(rows), *_load_lines(document, summary)])


def _load_lines(document: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    rate, goodput = summary["requests_per_s"], summary["goodput_per_s"]
    lines = [f"sent {summary['sent']}, " + ", ".join(f"{n} {kind}" for kind, n in Counter(summary["outcomes"]).items())]
    if rate is not None:
        tokens = summary.get("output_tokens_per_s")
        lines.append(
            f"inside the window of {summary['window_s']:.1f} s: {rate:.2f} requests/s, "
            + (f"{tokens:.1f} tokens/s, " if tokens is not None else "tokens not counted by the server, ")
            + f"goodput {goodput:.2f}/s ({summary['goodput_share'] or 0:.1%} of those meant for it)"
        )
    server = document["server"]
    for name, words in (("requests", "requests"), ("output_tokens", "output tokens"), ("requests_per_s", "requests/s")):
        if name in server:
            lines.append(f"the server counted {server[name]:.6g} {words}: {server[name + '_difference']:+.2%} here")
    lines += [f"STALL of {one['seconds']:.2f} s at {one['at_s']:.1f} s with {one['waiting']} requests waiting"
              for one in document["stalls"]]  # fmt: skip
    if document["stopped"]:
        lines.append(f"stopped early: {document['stopped']}")
    return [
        *lines,
        f"Lengths: {document['lengths']}. Latencies count from the actual send, 'intended' from the schedule.",
    ]


def schedule_facts(scheduled: Sequence[ScheduledRequest], of: int) -> dict[str, Any]:
    """What a schedule adds up to: JSON values. ``of``: requests of all slices."""
    return {
        "requests": len(scheduled), "of_all_slices": of, "prompt_tokens": sum(one.input_tokens for one in scheduled),
        "output_tokens": sum(one.output_tokens for one in scheduled),
        "last_send_s": max((one.at_ns or 0 for one in scheduled), default=0) / 1e9,
    }  # fmt: skip


def schedule_text(profile: Profile, share: ScheduleSlice, facts: Mapping[str, Any]) -> str:
    """A profile's values, and what its schedule adds up to."""
    rows = [[key, str(value)] for key, value in _flat(profile.model_dump(mode="json"))]
    return (
        f"{table(rows, ['value', 'is'])}\n\n"
        f"{facts['requests']} requests of {facts['of_all_slices']} (slice {share.number}/{share.of}), "
        f"{facts['prompt_tokens']} prompt tokens, {facts['output_tokens']} new tokens at most, last sent at "
        f"{facts['last_send_s']:.1f} s"
    )


def _flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows
