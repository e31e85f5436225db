"""Which server a command asks where nobody says: the one that ``minitron serve`` started here.

The servers' state folder tells each one's address and its repository, which holds the served tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron.errors import UsageError
from minitron_client.bench.requests import found_tokenizer
from minitron_client.client.endpoint import DEFAULT_URL
from minitron_triton.server import state
from minitron_triton.server.state import State


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Declare how to choose among several running servers."""
    add = parser.add_argument_group("which server, in place of --url").add_argument
    add("--repository", type=Path, metavar="DIR", help="the running server of this model repository")
    add("--state", type=Path, metavar="FOLDER", help="the --state given to 'minitron serve'")


def choose(args: argparse.Namespace) -> Path | None:
    """Set ``args.url`` where it was not given; returns the tokenizer of the server that it names, where that is known.

    Without a server of 'minitron serve' it is the default address. Raises UsageError where several run.
    """
    servers = [one for one in state.servers(args.state or state.home(), args.repository) if not one.ended]
    if args.url is not None:
        if args.repository is not None:
            raise UsageError("give --url or --repository, not both")
        servers = [one for one in servers if _url(one) == args.url.replace("localhost", "127.0.0.1")]
        return found_tokenizer(servers[0].repository) if servers else None
    servers = [one for one in servers if one.phase == "ready"] or servers
    if len(servers) > 1:
        known = "; ".join(f"{one.repository} at {_url(one)}" for one in servers)
        raise UsageError(f"{len(servers)} servers run here ({known}); choose with --url or --repository")
    if not servers and args.repository is not None:
        raise UsageError(f"no server of {args.repository} runs here; start it with 'minitron serve', or give --url")
    args.url = _url(servers[0]) if servers else DEFAULT_URL
    return found_tokenizer(servers[0].repository) if servers else None


def _url(server: State) -> str:
    """As this machine reaches it, where it listens on every address."""
    return server.urls["grpc"].replace("0.0.0.0", "127.0.0.1")
