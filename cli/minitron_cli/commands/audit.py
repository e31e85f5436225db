"""``minitron audit DIR``: a running server held against what its repository and its engine's plan meant."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import acceptance
from minitron.errors import NotReady
from minitron_triton.server import state


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("repository", type=Path, metavar="DIR", help="the model repository that is served")
    add("--state", type=Path, metavar="FOLDER", help="the --state given to 'minitron serve'")
    add("--output", type=Path, metavar="FILE", help="store the lines as JSON")
    add("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Judge, print; exit code 8 where a line failed, 10 where no such server runs."""
    from minitron_triton.audit.judging import judge_all, look

    running = [one for one in state.servers(args.state or state.home(), args.repository) if one.phase == "ready"]
    if not running:
        raise NotReady(f"no server of {args.repository} is ready here; 'minitron serve' starts one")
    found = look(args.repository, running[-1])
    return acceptance.report(judge_all(found), to=args.output, as_json=args.json, numbers=found.numbers())
