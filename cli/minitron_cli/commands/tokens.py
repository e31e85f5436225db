"""``minitron tokens``: greedy tokens of 20 prompts, stored, and compared with those of another engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import acceptance
from minitron.acceptance import Line, judge
from minitron.artifacts import manifest
from minitron.errors import UsageError
from minitron_client.client.arguments import add_connection, endpoint


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    what = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    store = what.add_parser("store", help="ask a running server and store what it says")
    store.add_argument("repository", type=Path, metavar="DIR", help="the model repository that is served")
    store.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="where to store them")
    store.add_argument("--count", type=int, metavar="N", help="tokens for each prompt (default 64)")
    add_connection(store)
    compare = what.add_parser("compare", help="hold a stored file against another one, the reference")
    compare.add_argument("found", type=Path, metavar="FILE", help="of the engine under test")
    compare.add_argument("reference", type=Path, metavar="REFERENCE", help="of the CPU engine in exact mode")
    compare.add_argument("--tolerance", type=float, metavar="NATS",
        help="how much log probs may differ (default: by activation type, float16 0.1, bfloat16 0.5)")  # fmt: skip
    for one in (store, compare):
        one.add_argument("--output", type=Path, metavar="FILE", help="store the lines as JSON")
        one.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Store or compare; exit code 8 where the verdict is bad."""
    judged = [_store(args)] if args.what == "store" else [_compare(args)]
    return acceptance.report(judged, to=args.output, as_json=args.json)


def _store(args: argparse.Namespace) -> Line:
    from minitron_client.client import Client
    from minitron_client.parity.stored import NEW_TOKENS, PROMPTS, Words, ask, encode

    record = manifest.read(args.repository / "engine", "engine")
    version, limits = record.details.get("tensorrt_llm"), record.details["limits"]
    ids = encode(args.repository / "tokenizer")
    longest = min(limits["max_seq_len"] - max(map(len, ids)), args.count or NEW_TOKENS)
    if longest < 1 or max(map(len, ids)) > limits["max_input_len"]:
        raise UsageError(f"the engine's limits are below the longest prompt of {max(map(len, ids))} tokens")
    with Client(endpoint(args)) as client:
        found = ask(client, PROMPTS, ids, longest)
    exact = version is None and record.details.get("execution") == "exact"
    words = Words(record.input.digest, f"TensorRT-LLM {version}" if version else "OpenVINO",
                  "float32" if exact else record.details["dtype"], tuple(found))  # fmt: skip
    words.write(args.tokens)
    return judge("words.stored", [], f"{len(found)} prompts x {longest} tokens by {words.engine} ({words.dtype})")


def _compare(args: argparse.Namespace) -> Line:
    from minitron_client.parity.compare import TOLERANCES, compare
    from minitron_client.parity.stored import Words

    found, reference = Words.read(args.found), Words.read(args.reference)
    tolerance = TOLERANCES[found.dtype] if args.tolerance is None else args.tolerance
    compared = compare(found, reference, tolerance)
    total = sum(one.tokens for one in compared)
    equal = sum(one.equal_tokens for one in compared)
    whole = sum(one.first_difference is None for one in compared)
    first = min((one.first_difference for one in compared if one.first_difference is not None), default=None)
    at = max((one.at for one in compared if one.at is not None), default=0.0)
    places = "" if first is None else f" (earliest at {first}, log probs there at most {at:.3f} apart)"
    shown = (
        f"{whole} of {len(compared)} prompts equal to the last token, {equal / total:.1%} of all tokens before a first "
        f"difference{places}; log probs at most {max(one.before for one in compared):.3f} apart, {tolerance:g} allowed"
    )
    return judge("words.same", [f"{one.prompt[:24]!r}: {one.problem}" for one in compared if one.problem], shown)
