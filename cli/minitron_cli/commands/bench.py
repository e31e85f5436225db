"""``minitron bench``: a grid of points with intervals, a load by a profile, or a search for the highest rate.

The first is what it does unless a profile, or a flag of a load, says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from minitron import errors, files
from minitron.arguments import complete_with
from minitron.console import emit_json
from minitron.errors import UsageError, VerdictError
from minitron.version import VERSION
from minitron_cli import running
from minitron_client.bench import compare, grid, schedule, search, show, watch
from minitron_client.bench import profile as profiles
from minitron_client.bench import run as runs
from minitron_client.bench.grid import DEFAULT_GRID, BenchPoint, BenchPointResult, Repetitions
from minitron_client.bench.process import scheduling
from minitron_client.bench.profile import FIXED_LENGTH, Profile
from minitron_client.bench.requests import SyntheticPrompts, found_tokenizer, make_requests, prompt_maker
from minitron_client.bench.schedule import ScheduleSlice
from minitron_client.bench.worker import Progress
from minitron_client.client.arguments import add_connection, client_of, endpoint_of_any_kind
from minitron_client.client.dialect import ServedModel
from minitron_client.client.openai import AnyEndpoint

log = logging.getLogger(__name__)

# Flags that are short for one value of a load's profile.
_PROFILE_FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--arrival", "arrival.kind", str, "closed, constant, poisson, gamma, ramp or trace"),
    ("--rate", "arrival.rate", float, "requests/s; of a ramp, at its start"),
    ("--to-rate", "arrival.to_rate", float, "requests/s at the end of a ramp"),
    ("--burstiness", "arrival.burstiness", float, "shape of gamma arrivals"),
    ("--concurrency", "arrival.concurrency", int, "streams of a closed loop"),
    ("--requests", "arrival.requests", int, "requests of a closed loop"),
    ("--trace", "arrival.trace", str, "trace to replay"),
    ("--duration", "duration_s", float, "seconds of sending"),
    ("--input-tokens", "input_tokens", int, "prompt length"),
    ("--output-tokens", "output_tokens", int, "answer length"),
    ("--workers", "workers", int, "processes that send"),
)
# What belongs to a grid alone, and to a load alone, by the names that argparse gives them.
_OF_GRIDS = ("grid", "repeats", "rounds", "beside", "baseline", "tolerance")
_OF_LOADS = ("profile", "set", "slice", "capacity", "goodput", "metrics_url", "dry_run",
             *(flag.removeprefix("--").replace("-", "_") for flag, *_ in _PROFILE_FLAGS))  # fmt: skip
_GOODPUT, _TOLERANCE = 0.95, 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--warm-up", type=float, metavar="X",
        help=f"of a grid: requests before each point that do not count (default {Repetitions.warm_up}); of a load: "
        "seconds that do not count (warm_up_s)")  # fmt: skip
    add("--deadline", type=float, metavar="SECONDS", help="give a request up after so long (of a load: deadline_s)")
    add("--seed", type=int, metavar="N", help="another seed, other prompts, and of a load another schedule (default 0)")
    add("--tokenizer", type=Path, metavar="DIR",
        help="the served tokenizer's folder (default: the manifest's, else the running server's, else the server "
        "counts)")  # fmt: skip
    add("--manifest", type=Path, metavar="DIR",
        help="engine or repository that is served, for its tokenizer, and for the roofline of its plan")  # fmt: skip
    add("--output", type=Path, metavar="PATH",
        help="of a grid: file to store the result in as JSON; of a load: folder of the run (default: "
        "out/runs/NAME-TIME)")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")
    add = parser.add_argument_group("a grid of points (the default)").add_argument
    add("--grid", nargs="+", metavar="INPUT:OUTPUT:CONCURRENCY",
        help=f"points to measure, in tokens and streams (default {' '.join(DEFAULT_GRID)})")  # fmt: skip
    add("--repeats", type=int, metavar="N", help=f"repeats per point (default {Repetitions.repeats})")
    add("--rounds", type=int, metavar="N", help=f"requests per stream and repeat (default {Repetitions.rounds})")
    add("--beside", type=Path, metavar="RUN", help="stored 16-bit run to print the ratio to")
    add("--baseline", type=Path, metavar="RUN", help="stored run that this one must not be worse than (exit code 8)")
    add("--tolerance", type=float, metavar="SHARE", help=f"how much worse is allowed (default {_TOLERANCE})")
    add = parser.add_argument_group("a load: any of these makes it one").add_argument
    about = f"what to do: {', '.join(profiles.shipped())}, or a file of yours"
    complete_with(add("--profile", metavar="NAME|FILE", help=about), profiles.shipped())
    add("--capacity", action="store_true",
        help="search the highest rate whose share of good requests stays above --goodput")  # fmt: skip
    add("--goodput", type=float, metavar="SHARE", help=f"share of good requests (default {_GOODPUT})")
    for flag, path, kind, about in _PROFILE_FLAGS:
        add(flag, type=kind, metavar="N" if kind is int else "X", help=f"{about} ({path})")
    add("--set", action="append", metavar="PATH=VALUE", help="any value of the profile (may be repeated)")
    add("--slice", metavar="I/N", help="send one of N disjoint shares of the same schedule")
    add("--metrics-url", metavar="HOST:PORT", help="the server's metrics, to compare counts with")
    add("--dry-run", action="store_true", help="print the schedule and send nothing")
    add_connection(parser, http=True)
    running.add_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, store, print, judge."""
    of_grid, of_load = _given(args, _OF_GRIDS), _given(args, _OF_LOADS)
    if of_grid and of_load:
        raise UsageError(f"{of_grid[0]} is of a grid and {of_load[0]} of a load; give one kind of them")
    return _load(args) if of_load else _grid(args)


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]


@dataclass(frozen=True)
class _Served:
    """What is measured: the model behind an endpoint, the server's version, prompts, and who counts their tokens."""

    endpoint: AnyEndpoint
    model: ServedModel
    version: str | None
    prompts: SyntheticPrompts
    counted_by: str


@contextlib.contextmanager
def _served(args: argparse.Namespace, seed: int) -> Iterator[_Served]:
    """Connected for as long as prompts are made: where nothing else can, the server counts their tokens."""
    found = running.choose(args)
    endpoint = endpoint_of_any_kind(args)
    with client_of(endpoint, args.model) as client:
        model, metadata = client.served_model(), client.metadata()
        tokenizer = args.tokenizer or found_tokenizer(args.manifest) or found
        yield _Served(endpoint, model, metadata.get("version"), *prompt_maker(client, model, tokenizer, seed))


# ---- a grid


def _grid(args: argparse.Namespace) -> int:
    points = [BenchPoint.parse(text) for text in args.grid or DEFAULT_GRID]
    repetitions = _repetitions(args)
    roofline = compare.read_roofline(args.manifest) if args.manifest else None
    beside = compare.read_run(args.beside) if args.beside else None
    baseline = compare.read_run(args.baseline) if args.baseline else None
    seed = args.seed or 0
    with _served(args, seed) as served:
        work = grid.measure(
            served.endpoint, served.model, points, prompts=served.prompts, repetitions=repetitions, progress=log.info
        )
        results, gone = asyncio.run(work)
    document = {
        "kind": "latency", "schema": grid.SCHEMA, "toolkit": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "scheduling": scheduling()},
        "url": args.url, "model": served.model.name, "dialect": served.model.dialect,
        "lengths": FIXED_LENGTH, "seed": seed,
        "repeats": repetitions.repeats, "rounds": repetitions.rounds, "warm_up": repetitions.warm_up,
        "intervals": "95 %: bootstrap over repeats and requests for percentiles, Student's t over repeats for tokens/s",
        "points": [one.document() for one in results],
        "server_version": served.version, "prompt_tokens_counted_by": served.counted_by,
        "roofline": vars(roofline) if roofline else None, "server_gone": gone,
    }  # fmt: skip
    if args.output:
        files.write_text(args.output, json.dumps(document, indent=1) + "\n")
    if args.json:
        emit_json(document)
    else:
        print(show.grid_table(results, roofline, compare.speedups(results, beside) if beside else {}))
        print("\n".join([*show.grid_remarks(results, served.counted_by), *_roofline_remarks(args, roofline)]))
    if gone:
        raise watch.failure(gone)
    return _grid_verdict(results, baseline, _TOLERANCE if args.tolerance is None else args.tolerance)


def _repetitions(args: argparse.Namespace) -> Repetitions:
    given = {"repeats": args.repeats, "rounds": args.rounds, "warm_up": args.warm_up}
    plain = {name: value for name, value in given.items() if value is not None}
    if args.warm_up is not None and args.warm_up != int(args.warm_up):
        raise UsageError(f"--warm-up {args.warm_up:g}: of a grid it counts requests, and is a whole number")
    made = Repetitions(**{name: int(value) for name, value in plain.items()}, deadline_s=args.deadline)
    if min(made.repeats, made.rounds) < 1 or made.warm_up < 0:
        raise UsageError("--repeats and --rounds must be at least 1, --warm-up at least 0")
    return made


def _roofline_remarks(args: argparse.Namespace, roofline: compare.Roofline | None) -> list[str]:
    lines = [f"The plan in {args.manifest} has no roofline."] if args.manifest and roofline is None else []
    if roofline and "weight_only" in roofline.precision and args.beside is None:
        lines.append("no 16-bit baseline (--beside RUN gives one)")
    return lines


def _grid_verdict(results: Sequence[BenchPointResult], baseline: dict[str, Any] | None, tolerance: float) -> int:
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


# ---- a load, and a search over loads


def _load(args: argparse.Namespace) -> int:
    profile = _profile(args)
    share = ScheduleSlice.parse(args.slice or "1/1")
    if args.dry_run:
        _print_schedule(profile, share, as_json=args.json)
        return 0
    if args.capacity and (share != ScheduleSlice() or profile.arrival.kind in ("closed", "ramp", "trace")):
        raise UsageError("--capacity varies the rate of constant, poisson or gamma arrivals, and takes no --slice")
    folder = args.output or _default_folder(args.profile)
    with _served(args, profile.seed) as served:
        facts = {"url": args.url, "model": served.model.name, "server_version": served.version,
                 "prompt_tokens_counted_by": served.counted_by, "lengths": profile.lengths}  # fmt: skip

        def stored(one: Profile, place: Path) -> dict[str, Any]:
            """A run of the search, kept for itself: the search may never come to its end."""
            found = _send(served, one, place, ScheduleSlice(), args.metrics_url) | facts
            files.write_text(place / runs.RESULT, json.dumps(found) + "\n")
            return found

        if args.capacity:
            goodput = _GOODPUT if args.goodput is None else args.goodput
            document = search.find_capacity(profile, stored, folder, goodput) | facts
        else:
            document = _send(served, profile, folder, share, args.metrics_url) | facts
    name = runs.RESULT if share == ScheduleSlice() else f"run-{share.number}-of-{share.of}.json"
    files.write_text(folder / name, json.dumps(document) + "\n")
    if args.json:
        emit_json(document)
    else:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        print(search.text(document) if args.capacity else show.load_text(document))
        print(f"records and result: {folder}; 'minitron report {folder}' draws them")
    return _load_verdict(document)


def _send(
    served: _Served, profile: Profile, folder: Path, share: ScheduleSlice, metrics_url: str | None
) -> dict[str, Any]:
    """Make the requests of a profile and send them; the result of the run."""
    scheduled = [one for one in schedule.plan(profile) if share.takes(one.index)]
    if not scheduled:
        raise UsageError("the schedule holds no request; raise the rate or the duration")
    few = served.counted_by == "the server"
    if few and profile.prompts.kind == "synthetic" and len({one.input_tokens for one in scheduled}) > 4:
        raise UsageError("prompts of many lengths need the served tokenizer; give --tokenizer or --manifest")
    log.info("preparing %d requests", len(scheduled))
    ready = make_requests(scheduled, profile, served.model, served.prompts, few_prompts=few)
    runs.new_run_folder(folder, share)
    return runs.execute(
        profile, ready, served.endpoint, folder, model=served.model.counted_as, share=share,
        metrics_url=metrics_url, show=_show_second,
    )  # fmt: skip


def _profile(args: argparse.Namespace) -> Profile:
    settings = [profiles.parse_setting(text) for text in args.set or ()]
    common = (("--warm-up", "warm_up_s"), ("--deadline", "deadline_s"), ("--seed", "seed"))
    for flag, path in (*((flag, path) for flag, path, _, _ in _PROFILE_FLAGS), *common):
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            settings.append((path, value))
    return profiles.load(args.profile, settings)


def _default_folder(profile: str | None) -> Path:
    name = Path(profile).stem if profile else "load"
    return Path("out", "runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def _show_second(seconds: float, second: Progress) -> None:
    """One line a second on a terminal, one in ten elsewhere."""
    ttft = f"TTFT {median(second.ttft_ms):.0f} ms" if second.ttft_ms else "no first token"
    line = (f"{seconds:5.0f} s  sent {second.sent}/s  done {second.ended}/s  in flight {second.in_flight}  {ttft}"
            f"  failed {second.failed}")  # fmt: skip
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    elif round(seconds) % 10 == 0:
        log.info("%s", line)


def _print_schedule(profile: Profile, share: ScheduleSlice, *, as_json: bool) -> None:
    scheduled = schedule.plan(profile)
    ours = [one for one in scheduled if share.takes(one.index)]
    facts = show.schedule_facts(ours, len(scheduled))
    if as_json:
        rows = [[one.index, one.at_ns, one.input_tokens, one.output_tokens] for one in ours]
        emit_json({"profile": profile.model_dump(mode="json"), "plan": facts, "requests": rows})
    else:
        print(show.schedule_text(profile, share, facts))


def _load_verdict(document: dict[str, Any]) -> int:
    if document.get("stopped") == "interrupted":
        return errors.EXIT_INTERRUPTED
    if document.get("stopped") == watch.GONE:
        raise watch.failure(document["server_gone"])
    if document["kind"] == "load" and document["summary"]["sent"] and "ok" not in document["summary"]["outcomes"]:
        raise VerdictError(f"every request failed: {document['summary']['outcomes']}")
    return 0
