"""The arguments with which every command of this room reaches a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import api_keys
from minitron.errors import UsageError
from minitron.text.channel import DEFAULT_URL
from minitron_client.client.blocking import Client, HttpClient
from minitron_client.client.endpoint import ApiKey, Endpoint, Tls
from minitron_client.client.openai import AnyEndpoint, HttpEndpoint


def add_connection(parser: argparse.ArgumentParser, *, http: bool = False) -> None:
    """Declare where the server is and how to reach it; ``http``: OpenAI's HTTP will do as well, and who calls finds a
    server where none is named.
    """
    group = parser.add_argument_group("server")
    add = group.add_argument
    or_http = ", or an OpenAI API such as http://127.0.0.1:8080/v1" if http else ""
    kinds = "HOST:PORT|URL" if http else "HOST:PORT"
    default = None if http else DEFAULT_URL
    where = f"that of the running server, else {DEFAULT_URL}" if http else DEFAULT_URL
    add("--url", default=default, metavar=kinds, help=f"its gRPC address{or_http} (default: {where})")
    add("--model", metavar="NAME", help="model to ask (default: tensorrt_llm_bls, else ensemble, else tensorrt_llm)")
    add_security(group)
    add("--keepalive", type=float, default=Endpoint.keepalive_s, metavar="SECONDS",
        help="ask a silent server so often whether it lives, 0: never (default %(default)g, which every server takes; "
        "10 is for those that 'minitron serve' started)")  # fmt: skip


def add_security(group: argparse._ArgumentGroup) -> None:
    """Declare how to speak TLS with it, and with which key."""
    add = group.add_argument
    add("--tls", action="store_true", help="speak TLS; the three below imply it")
    add("--tls-ca", type=Path, metavar="PEM", help="authority that signed the server's certificate")
    add("--tls-cert", type=Path, metavar="PEM", help="our certificate, for mutual TLS")
    add("--tls-key", type=Path, metavar="PEM", help="our certificate's private key")
    add("--api-key-file", type=Path, metavar="FILE", help="send the API key in this file")


def endpoint(args: argparse.Namespace) -> Endpoint:
    """The server that ``add_connection``'s arguments name; raises UsageError, InputError."""
    return Endpoint(args.url, *security(args), args.keepalive)


def endpoint_of_any_kind(args: argparse.Namespace) -> AnyEndpoint:
    """The same where ``http`` was allowed."""
    return HttpEndpoint(args.url.rstrip("/"), *security(args)) if "://" in args.url else endpoint(args)


def security(args: argparse.Namespace) -> tuple[Tls | None, ApiKey | None]:
    """What ``add_security``'s arguments say; raises UsageError, InputError."""
    tls = Tls(args.tls_ca, args.tls_cert, args.tls_key)
    key = ApiKey(api_keys.sent(args.api_key_file)) if args.api_key_file else None
    return tls if args.tls or tls != Tls() else None, key


def client_of(
    server: AnyEndpoint,
    model: str | None,
    *,
    deadline_s: float | None = None,
    tokenizer: Path | None = None,
) -> Client | HttpClient:
    """A client of a server; raises UsageError for a ``tokenizer`` where the server makes the text."""
    if isinstance(server, Endpoint):
        return Client(server, model=model, deadline_s=deadline_s, tokenizer=tokenizer)
    if tokenizer:
        raise UsageError(f"{server.url} makes the text itself; --tokenizer is for tensorrt_llm over gRPC")
    return HttpClient(server, model=model, deadline_s=deadline_s)
