"""``minitron conformance``: does a running server behave as TensorRT-LLM's Triton backend is documented to."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from minitron import acceptance
from minitron.errors import UsageError
from minitron_client.client.arguments import add_connection, endpoint

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("repository", type=Path, metavar="DIR", help="the model repository that is served: its limits and tokenizer")
    add("--metrics-url", metavar="HOST:PORT", help="the server's metrics; without them cancelling cannot be seen")
    add("--http-url", metavar="HOST:PORT", help="its HTTP address; without it only gRPC is asked")
    add("--only", nargs="+", metavar="CASE", help="some cases, such as stop_words (default: all)")
    add("--output", type=Path, metavar="FILE", help="store the lines as JSON")
    add("--json", action="store_true", help="print one JSON document instead of a table")
    add_connection(parser)


def run(args: argparse.Namespace) -> int:
    """Judge, print; exit code 8 where a line failed."""
    from minitron_client.conformance import suite
    from minitron_client.conformance.subject import Subject

    names = [name if "." in name else f"behaviour.{name}" for name in args.only or suite.CASES]
    if unknown := next((name for name in names if name not in suite.CASES), None):
        known = ", ".join(name.partition(".")[2] for name in suite.CASES)
        raise UsageError(f"there is no case {unknown}; there are {known}")
    with Subject.of_repository(endpoint(args), args.repository, args.metrics_url, args.http_url) as subject:
        judged = []
        for line in suite.run(subject, names):
            log.info("%s %s", line.status, line.id)
            judged.append(line)
        engine = subject.engine
    return acceptance.report(judged, to=args.output, as_json=args.json, url=args.url, engine=engine)
