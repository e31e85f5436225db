"""``minitron gateway``: OpenAI's HTTP API over running servers."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

from minitron import api_keys
from minitron.console import emit_json
from minitron.errors import InputError, UsageError, values_as_input
from minitron.text import credentials
from minitron.text.channel import DEFAULT_URL
from minitron.text.engine import Address
from minitron_gateway import names, serving
from minitron_gateway.settings import Interval, Limits, Settings

log = logging.getLogger(__name__)

_DEFAULT_LISTEN = "127.0.0.1:8080"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "--listen",
        default=_DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help="where to listen, port 0: a free one (default %(default)s)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes (default %(default)s)")
    add("--model-name", default="minitron", metavar="NAME", help="the model's name for clients (default %(default)s)")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (default: the repository's)")
    add("--repository", type=Path, metavar="DIR",
        help="read limits and tokenizer from this model repository (default: the first server is asked)")  # fmt: skip
    add("--wait", type=float, default=10, metavar="SECONDS",
        help="how long the first server may take to answer (default %(default)s)")  # fmt: skip
    add("--stream-interval", default="1", metavar="N|MSms",
        help="send a stream's text every so many tokens (8) or ms (50ms); default: every token as it comes, and what "
        "is there where the gateway is behind")  # fmt: skip
    add("--sse-keep-alive", type=float, default=Settings.keep_alive_s, metavar="SECONDS",
        help="send a comment on a stream that was silent so long, for balancers on the way, 0: never (default "
        "%(default)g)")  # fmt: skip
    add("--drain-timeout", type=float, default=Settings.drain_s, metavar="SECONDS",
        help="how long streams in flight may go on after SIGTERM (default %(default)g)")  # fmt: skip
    add("--json", action="store_true", help="when ready, print where it listens as JSON")
    client = parser.add_argument_group("clients").add_argument
    client("--api-key-file", type=Path, metavar="FILE", help="demand one of the bearer keys in this file, one a line")
    client("--tls-cert", type=Path, metavar="PEM", help="certificate: HTTPS in place of HTTP")
    client("--tls-key", type=Path, metavar="PEM", help="the certificate's private key")
    client(
        "--max-body", type=int, default=Limits.body_bytes, metavar="BYTES", help="largest body (default %(default)s)"
    )
    client("--max-prompts", type=int, metavar="N",
        help="most prompts of a request, times its n or best_of (default "
        f"{Limits.sequences}, or a worker's share of --max-streams where that is less)")  # fmt: skip
    client("--max-streams", type=int, default=Limits.streams, metavar="N",
        help="most sequences in flight, shared out among the workers (default %(default)s)")  # fmt: skip
    server = parser.add_argument_group("servers").add_argument
    server("--upstream", action="append", metavar="HOST:PORT",
        help="gRPC address of a server, or dns:///NAME:PORT for all that a name stands for; may be repeated "
        f"(default {DEFAULT_URL})")  # fmt: skip
    server("--upstream-ca", type=Path, metavar="PEM", help="speak TLS; authority that signed the servers' certificates")
    server("--upstream-cert", type=Path, metavar="PEM", help="our certificate, for mutual TLS")
    server("--upstream-key", type=Path, metavar="PEM", help="our certificate's private key")
    server(
        "--upstream-authority",
        default="",
        metavar="NAME",
        help="name in the servers' certificates, where it is not their host",
    )
    server("--upstream-api-key-file", type=Path, metavar="FILE", help="send the API key in this file")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""

    def on_ready(ready: Settings) -> None:
        log.info("ready: %s serves %r; Ctrl-C ends it", ready.url, ready.model)
        if args.json:
            emit_json({"schema": 1, "url": ready.url, "model": ready.model, "pid": os.getpid()})

    return serving.run(_settings(args), on_ready)


def _settings(args: argparse.Namespace) -> Settings:
    host, port = _address(args.listen)
    for name in ("workers", "max_body", "max_prompts", "max_streams"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("HTTPS needs both --tls-cert and --tls-key")
    if not 0 <= args.sse_keep_alive < math.inf:
        raise UsageError(f"--sse-keep-alive {args.sse_keep_alive:g} is no time; give seconds, or 0 for never")
    interval = Interval.parse(args.stream_interval)
    keys = _keys(args.api_key_file)
    upstreams = _upstreams(args)
    parameters, tokenizer = _model(args, upstreams)
    return Settings(
        host, port, upstreams, str(tokenizer), parameters, args.model_name, args.workers,
        Limits.shared(args.max_body, args.max_prompts, args.max_streams, args.workers), interval, keys,
        *_own_tls(args.tls_cert, args.tls_key), args.drain_timeout, args.sse_keep_alive,
    )  # fmt: skip


def _model(args: argparse.Namespace, upstreams: tuple[Address, ...]) -> tuple[dict[str, str], Path]:
    """The text model's parameters, and the tokenizer folder on this machine."""
    from minitron_gateway import finding

    if args.repository:
        parameters, folder = finding.of_repository(args.repository)
    else:
        parameters, folder = finding.of_servers(upstreams, args.wait)
    folder = args.tokenizer or folder
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder here; --tokenizer names the tokenizer's, or --repository the model repository"
        )
    return parameters, folder


def _upstreams(args: argparse.Namespace) -> tuple[Address, ...]:
    if (args.upstream_cert is None) != (args.upstream_key is None):
        raise UsageError("mutual TLS needs both --upstream-cert and --upstream-key")
    if args.upstream_cert and not args.upstream_ca:
        raise UsageError("--upstream-cert needs --upstream-ca")
    given = {
        "ca": str(args.upstream_ca or ""), "cert": str(args.upstream_cert or ""), "key": str(args.upstream_key or ""),
        "api_key_file": str(args.upstream_api_key_file or ""), "authority": args.upstream_authority,
    }  # fmt: skip
    for url in args.upstream or ():
        if url.startswith("dns:") and (wrong := names.check(url)):
            raise UsageError(f"--upstream {wrong}")
    # 'minitron serve' tells its gateway where it listens as it tells its models.
    told = replace(Address.of({}), **{name: value for name, value in given.items() if value})
    found = tuple(Address(url, **given) for url in args.upstream or ()) or (told,)
    with values_as_input():
        found[0].check()
    return found


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen {text!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


def _own_tls(certificate: Path | None, key: Path | None) -> tuple[str, str]:
    with values_as_input():
        credentials.pem(None, certificate, key)
    return str(certificate or ""), str(key or "")


def _keys(path: Path | None) -> frozenset[bytes]:
    """SHA-256 of the keys in a file; raises InputError."""
    if path is None:
        return frozenset()
    return frozenset(hashlib.sha256(key.encode()).digest() for key in api_keys.demanded(path))
