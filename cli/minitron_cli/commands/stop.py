"""``minitron stop [DIR]``: end the servers of a repository, and whatever a killed one left."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from minitron import console
from minitron.errors import UsageError
from minitron_triton.server import state, stopping

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("repository", type=Path, nargs="?", metavar="DIR", help="of this model repository (default: the only one)")
    add("--all", action="store_true", help="of every repository")
    add("--state", type=Path, metavar="FOLDER", help="the --state given to 'minitron serve'")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Stop them; raises UsageError where it is not clear which. The exit code is that of the first that ended badly."""
    servers = state.servers(args.state or state.home(), args.repository)
    running = [server for server in servers if not server.ended]
    if len(running) > 1 and not args.all and args.repository is None:
        raise UsageError(f"{len(running)} servers run; name a repository ('minitron status' lists them) or give --all")
    stopped = [stopping.stop(server) for server in servers]
    if args.json:
        console.emit_json(
            [{"repository": str(each.repository), "how": each.how, "log": str(each.log) if each.log else None}
             for each in stopped]
        )  # fmt: skip
    else:
        for each in stopped:
            print(f"{each.repository}: {each.how}")
        if not stopped:
            print("nothing to stop")
    return next((each.exit_code for each in stopped if each.exit_code), 0)
