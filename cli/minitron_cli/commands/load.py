"""``minitron load``: a load test by a profile, its records as they come, its result as a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from minitron import files
from minitron.console import emit_json, table
from minitron.errors import UsageError, VerdictError
from minitron_client.bench import gone, requests, schedule, search
from minitron_client.bench import profile as profiles
from minitron_client.bench import run as runs
from minitron_client.bench.latency import FIXED_LENGTH
from minitron_client.bench.profile import Profile
from minitron_client.bench.prompts import PromptMaker, found_tokenizer, prompt_maker
from minitron_client.bench.schedule import Planned, Slice
from minitron_client.bench.statistics import remark, shown
from minitron_client.bench.summary import METRICS
from minitron_client.bench.worker import Progress
from minitron_client.client.arguments import add_connection, client_of, endpoint_of_any_kind
from minitron_client.client.dialect import ServedModel

log = logging.getLogger(__name__)

# Flags that are short for one value of the profile.
_FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--arrival", "arrival.kind", str, "closed, constant, poisson, gamma, ramp or trace"),
    ("--rate", "arrival.rate", float, "requests/s; of a ramp, at its start"),
    ("--to-rate", "arrival.to_rate", float, "requests/s at the end of a ramp"),
    ("--burstiness", "arrival.burstiness", float, "shape of gamma arrivals"),
    ("--concurrency", "arrival.concurrency", int, "streams of a closed loop"),
    ("--requests", "arrival.requests", int, "requests of a closed loop"),
    ("--trace", "arrival.trace", str, "trace to replay"),
    ("--duration", "duration_s", float, "seconds of sending"),
    ("--warm-up", "warm_up_s", float, "seconds that do not count"),
    ("--input-tokens", "input_tokens", int, "prompt length"),
    ("--output-tokens", "output_tokens", int, "answer length"),
    ("--deadline", "deadline_s", float, "seconds after which a request is given up"),
    ("--seed", "seed", int, "same seed, same requests and schedule"),
    ("--workers", "workers", int, "processes that send"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--profile", metavar="NAME|FILE", help=f"what to do: {', '.join(profiles.shipped())}, or a file of yours")
    for flag, path, kind, about in _FLAGS:
        add(flag, type=kind, metavar="N" if kind is int else "X", help=f"{about} ({path})")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="any value of the profile (may be repeated)")
    add("--slice", default="1/1", metavar="I/N", help="send one of N disjoint shares of the same schedule")
    add("--find-capacity", action="store_true",
        help="search the highest rate whose share of good requests stays above --goodput")  # fmt: skip
    add("--goodput", type=float, default=0.95, metavar="SHARE", help="share of good requests (default %(default)s)")
    add("--tokenizer", type=Path, metavar="DIR", help="the served tokenizer's folder (default: the manifest's)")
    add("--manifest", type=Path, metavar="DIR", help="engine or repository that is served, for its tokenizer")
    add("--metrics-url", metavar="HOST:PORT", help="the server's metrics, to compare counts with")
    add("--output", type=Path, metavar="DIR", help="folder of the run (default: out/runs/NAME-TIME)")
    add("--dry-run", action="store_true", help="print the plan and send nothing")
    add("--json", action="store_true", help="print the result as JSON")
    add_connection(parser, http=True)


def run(args: argparse.Namespace) -> int:
    """Plan, send, add up, print."""
    profile = _profile(args)
    share = Slice.parse(args.slice)
    if args.dry_run:
        _print_plan(profile, schedule.plan(profile), share, as_json=args.json)
        return 0
    if args.find_capacity and (share != Slice() or profile.arrival.kind in ("closed", "ramp", "trace")):
        raise UsageError("--find-capacity varies the rate of constant, poisson or gamma arrivals, and takes no --slice")
    folder = args.output or _default_folder(args.profile)
    with client_of(endpoint_of_any_kind(args), args.model) as client:
        model, metadata = client.served_model(), client.metadata()
        prompts, counted_by = prompt_maker(
            client, model, args.tokenizer or found_tokenizer(args.manifest), profile.seed
        )
        maker = _Maker(args, model, prompts, few=counted_by == "the server")
        facts = {"url": args.url, "model": model.name, "server_version": metadata.get("version"),
                 "prompt_tokens_counted_by": counted_by,
                 "lengths": FIXED_LENGTH if profile.fixed_output else "answers end where the model does"}  # fmt: skip
        if args.find_capacity:

            def stored(one: Profile, place: Path) -> dict[str, Any]:
                """A run of the search, kept for itself: the search may never come to its end."""
                found = maker.measure(one, place) | facts
                files.write_text(place / runs.RESULT, json.dumps(found) + "\n")
                return found

            document = search.find_capacity(profile, stored, folder, args.goodput) | facts
        else:
            document = maker.measure(profile, folder, share) | facts
    name = runs.RESULT if share == Slice() else f"run-{share.number}-of-{share.of}.json"
    files.write_text(folder / name, json.dumps(document) + "\n")
    if args.json:
        emit_json({key: value for key, value in document.items() if key != "state"})
    else:
        _print_result(document, folder)
    return _verdict(document)


class _Maker:
    """Makes the requests of a profile and has them sent."""

    def __init__(self, args: argparse.Namespace, model: ServedModel, prompts: PromptMaker, *, few: bool) -> None:
        self._args, self._model, self._prompts, self._few = args, model, prompts, few

    def measure(self, profile: Profile, folder: Path, share: Slice | None = None) -> dict[str, Any]:
        """One run; its result document."""
        share = share or Slice()
        planned = [one for one in schedule.plan(profile) if share.takes(one.index)]
        if not planned:
            raise UsageError("the plan holds no request; raise the rate or the duration")
        if self._few and profile.prompts.kind == "synthetic" and len({one.input_tokens for one in planned}) > 4:
            raise UsageError("prompts of many lengths need the served tokenizer; give --tokenizer or --manifest")
        log.info("preparing %d requests", len(planned))
        ready = requests.build(planned, profile, self._model, self._prompts, few_prompts=self._few)
        runs.new_run_folder(folder, share)
        return runs.execute(
            profile, ready, endpoint_of_any_kind(self._args), folder, model=self._model.counted_as,
            share=share, metrics_url=self._args.metrics_url, show=_show,
        )  # fmt: skip


def _profile(args: argparse.Namespace) -> Profile:
    settings = [profiles.parse_setting(text) for text in args.set]
    for flag, path, _, _ in _FLAGS:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            settings.append((path, value))
    return profiles.load(args.profile, settings)


def _default_folder(profile: str | None) -> Path:
    name = Path(profile).stem if profile else "load"
    return Path("out", "runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def _show(seconds: float, second: Progress) -> None:
    """One line a second on a terminal, one in ten elsewhere."""
    ttft = f"TTFT {median(second.ttft_ms):.0f} ms" if second.ttft_ms else "no first token"
    line = (f"{seconds:5.0f} s  sent {second.sent}/s  done {second.ended}/s  in flight {second.in_flight}  {ttft}"
            f"  failed {second.failed}")  # fmt: skip
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    elif round(seconds) % 10 == 0:
        log.info("%s", line)


def _print_plan(profile: Profile, planned: Sequence[Planned], share: Slice, *, as_json: bool) -> None:
    mine = [one for one in planned if share.takes(one.index)]
    last = max((one.at_ns or 0 for one in mine), default=0) / 1e9
    facts = {
        "requests": len(mine), "of_all_slices": len(planned), "prompt_tokens": sum(one.input_tokens for one in mine),
        "output_tokens": sum(one.output_tokens for one in mine), "last_send_s": last,
    }  # fmt: skip
    if as_json:
        rows = [[one.index, one.at_ns, one.input_tokens, one.output_tokens] for one in mine]
        emit_json({"profile": profile.model_dump(mode="json"), "plan": facts, "requests": rows})
        return
    print(table([[key, str(value)] for key, value in _flat(profile.model_dump(mode="json"))], ["value", "is"]))
    print(
        f"\n{len(mine)} requests of {len(planned)} (slice {share.number}/{share.of}), {facts['prompt_tokens']} prompt "
        f"tokens, {facts['output_tokens']} new tokens at most, last sent at {last:.1f} s"
    )


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _print_result(document: dict[str, Any], folder: Path) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if document["kind"] == "capacity":
        print(search.text(document))
    else:
        summary = document["summary"]
        rows = [[METRICS[name], *map(shown, shares.values())] for name, shares in summary["latency_ms"].items()]
        print(table(rows, ["ms", "p50", "p90", "p99"]))
        print("\n".join([*remark(rows), *_lines(document, summary)]))
    print(f"records and result: {folder}; 'minitron report {folder}' draws them")


def _lines(document: dict[str, Any], summary: dict[str, Any]) -> list[str]:
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


def _verdict(document: dict[str, Any]) -> int:
    if document.get("stopped") == "interrupted":
        return 130
    if document.get("stopped") == gone.GONE:
        raise gone.failure(document["server_gone"])
    if document["kind"] == "load" and document["summary"]["sent"] and "ok" not in document["summary"]["outcomes"]:
        raise VerdictError(f"every request failed: {document['summary']['outcomes']}")
    return 0
