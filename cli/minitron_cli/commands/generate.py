"""``minitron generate``: a prompt to the server, its text to stdout as it streams, a line of statistics to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron import files, tracing
from minitron.console import emit_json
from minitron.errors import UsageError
from minitron.text import trace_context
from minitron_cli import running
from minitron_client.client import Request, Response, dialect
from minitron_client.client.arguments import add_connection, client_of, endpoint_of_any_kind

_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("min-tokens", int, "generate at least so many"),
    ("temperature", float, "0 takes the likeliest token every time"),
    ("top-k", int, "sample among so many of the likeliest tokens"),
    ("top-p", float, "sample among the likeliest tokens that make up this share"),
    ("seed", int, "same seed, same tokens"),
    ("repetition-penalty", float, "above 1: repeat less"),
    ("presence-penalty", float, "above 0: repeat less"),
    ("frequency-penalty", float, "above 0: repeat less"),
    ("length-penalty", float, "for beam search"),
    ("beam-width", int, "beam search; needs --no-stream"),
    ("num-return-sequences", int, "answers to the same prompt; needs --no-stream"),
    ("end-id", int, "token that ends the answer (default: the tokenizer's)"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt; without it and --file, stdin is read")
    add("--file", type=Path, metavar="FILE", help="read the prompt from a file")
    add("--ids", metavar="ID,ID,…", help="token ids in place of a prompt, for --model tensorrt_llm")
    add("--tokenizer", type=Path, metavar="DIR",
        help="make the text here, with the served tokenizer in this folder, over tensorrt_llm itself (with --model "
        "tensorrt_llm: by default, with that of the running server)")  # fmt: skip
    add("--no-stream", action="store_true", help="wait for the whole answer")
    add("--deadline", type=float, metavar="SECONDS", help="give up after so long")
    add("--json", action="store_true", help="print the answer with its counts and times as JSON")
    sampling = parser.add_argument_group("generation").add_argument
    sampling("--max-tokens", type=int, default=128, metavar="N", help="generate at most so many (default %(default)s)")
    for name, kind, about in _SAMPLING:
        sampling(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=about)
    sampling("--ignore-end", action="store_true", help="generate past the end token")
    sampling("--stop", action="append", metavar="WORDS", help="end where these words appear (may be repeated)")
    add_connection(parser, http=True)
    running.add_choice(parser)


def run(args: argparse.Namespace) -> int:
    """Send the prompt and print what comes back."""
    tracing.start("minitron-generate")
    request = _request(args)
    found = running.choose(args)
    if args.tokenizer is None and args.model == dialect.FRONTS[-1] and request.input_ids is None:
        args.tokenizer = found  # it takes ids alone
    with client_of(
        endpoint_of_any_kind(args), args.model, deadline_s=args.deadline, tokenizer=args.tokenizer
    ) as client:
        if args.no_stream:
            response = client.generate(request)
        else:
            with client.stream(request) as stream:
                for chunk in stream:
                    if not args.json:
                        print(chunk.text or _ids(chunk.token_ids), end="", flush=True)
            response = stream.response
    if args.json:
        emit_json(_document(request, response))
        return 0
    if args.no_stream:
        print("\n".join(one.text or _ids(one.token_ids) for one in response.outputs), end="")
    print(flush=True)
    print(_statistics(response), file=sys.stderr)
    return 0


def _request(args: argparse.Namespace) -> Request:
    settings = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name, _, _ in _SAMPLING}
    settings |= {"max_tokens": args.max_tokens, "ignore_end": args.ignore_end, "stop_words": args.stop}
    if trace := trace_context.received([os.environ.get("TRACEPARENT", "")]):  # of the script that calls us
        settings["traceparent"] = trace[0][1]
    if not args.no_stream and max(args.num_return_sequences or 1, args.beam_width or 1) > 1:
        raise UsageError("several answers at once cannot be streamed to a terminal; add --no-stream")
    if args.ids is None:
        return Request(_prompt(args), **settings)
    if args.prompt is not None or args.file:
        raise UsageError("give --ids or a prompt, not both")
    try:
        return Request(input_ids=[int(word) for word in args.ids.replace(",", " ").split()], **settings)
    except ValueError:
        raise UsageError(f"--ids {args.ids!r} holds something that is no number") from None


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        if args.file:
            raise UsageError("give a prompt or --file, not both")
        return str(args.prompt)
    if args.file is None and sys.stdin.isatty():
        raise UsageError("give a prompt, --file FILE, or text on stdin")
    return files.read_text(args.file) if args.file else files.decoded(sys.stdin.buffer.read(), "stdin")


def _ids(token_ids: tuple[int, ...]) -> str:
    return "".join(f"{token} " for token in token_ids)


def _statistics(response: Response) -> str:
    timing = response.timing
    parts = [f"{response.token_count} tokens" if response.token_count is not None else "tokens not counted"]
    if timing.e2e_ns:
        parts.append(f"{timing.e2e_ns / 1e9:.2f} s")
        if timing.output_tokens:
            parts.append(f"{timing.output_tokens / timing.e2e_ns * 1e9:.1f} tokens/s")
    if timing.ttft_ns is not None:
        parts.append(f"TTFT {timing.ttft_ns / 1e6:.1f} ms")
    if timing.tpot_ns is not None:
        parts.append(f"TPOT {timing.tpot_ns / 1e6:.2f} ms")
    return ", ".join([*parts, f"finish reason {response.finish_reason or 'not known'}", f"model {response.model}"])


def _document(request: Request, response: Response) -> dict[str, Any]:
    """The answer as JSON; times in milliseconds, null where they cannot be known."""
    timing = response.timing
    return {
        "schema": 1, "request_id": response.request_id, "model": response.model,
        "prompt": request.prompt, "input_ids": request.input_ids, "input_tokens": response.input_token_count,
        "text": response.text, "output_tokens": response.token_count, "finish_reason": response.finish_reason,
        "outputs": [asdict(one) for one in response.outputs],
        "ttft_ms": _ms(timing.ttft_ns), "tpot_ms": _ms(timing.tpot_ns), "e2e_ms": _ms(timing.e2e_ns),
        "tokens_per_s": timing.output_tokens / timing.e2e_ns * 1e9 if timing.output_tokens and timing.e2e_ns else None,
    }  # fmt: skip


def _ms(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e6
