"""``minitron status [DIR]``: the servers that 'minitron serve' started."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import console
from minitron.errors import NotReady
from minitron_triton.server import state


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("repository", type=Path, nargs="?", metavar="DIR", help="of this model repository (default: of all)")
    add("--state", type=Path, metavar="FOLDER", help="the --state given to 'minitron serve'")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the servers; exit code 10 when none of them is ready."""
    servers = state.servers(args.state or state.home(), args.repository)
    if args.json:
        console.emit_json([server.document() for server in servers])
    elif servers:
        rows = [
            (server.repository, server.phase, server.restarts,
             *(server.urls[name] for name in ("grpc", "http", "metrics")), server.supervisor.pid, server.log)
            for server in servers
        ]  # fmt: skip
        print(console.table(rows, ("repository", "phase", "restarts", "grpc", "http", "metrics", "pid", "log")))
    else:
        print(f"no server of {args.repository}" if args.repository else "no server")
    return 0 if any(server.phase == "ready" for server in servers) else NotReady.exit_code
