"""Which server a command asks where nobody says: the one that ``minitron serve`` started here.

The servers' state folder tells each one's address and its repository, which holds the served tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron.errors import NotReady, UsageError
from minitron.text.channel import DEFAULT_URL
from minitron_client.bench.requests import found_tokenizer
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
    if args.url is not None:
        if args.repository is not None:
            raise UsageError("give --url or --repository, not both")
        wanted = args.url.replace("localhost", "127.0.0.1")
        found = next((one for one in _living(args.state, None) if address(one) == wanted), None)
    else:
        found = find(args.state, args.repository)
        if found is None and args.repository is not None:
            raise UsageError(f"no server of {args.repository} runs here; start it with 'minitron serve', or give --url")
        args.url = address(found) if found else DEFAULT_URL
    return found_tokenizer(found.repository) if found else None


def find(parent: Path | None, repository: Path | None, flags: str = "--url or --repository") -> State | None:
    """The server of 'minitron serve', or that of ``repository``: the only one, or the only one that is ready.

    ``parent``: the servers' state folder, None: the user's. Raises UsageError where ``flags`` have to choose.
    """
    living = _living(parent, repository)
    servers = [one for one in living if one.phase == "ready"] or living
    if len(servers) > 1:
        known = "; ".join(f"{one.repository} at {address(one)}" for one in servers)
        raise UsageError(f"{len(servers)} servers run here ({known}); choose with {flags}")
    return servers[0] if servers else None


def ready(parent: Path | None, repository: Path | None) -> State:
    """The same for an acceptance, where it is ready; raises NotReady else."""
    found = find(parent, repository, "its DIR or --url")
    if found is None or found.phase != "ready":
        which = f"of {repository} " if repository else ""
        raise NotReady(f"no server {which}is ready here; 'minitron serve' starts one")
    return found


def address(server: State) -> str:
    """Of its gRPC, as this machine reaches it where it listens on every address."""
    return server.urls["grpc"].replace("0.0.0.0", "127.0.0.1")


def _living(parent: Path | None, repository: Path | None) -> list[State]:
    return [one for one in state.servers(parent or state.home(), repository) if not one.ended]
