"""The arguments with which every command of this room reaches a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron_trtllm import api_keys
from minitron_trtllm.client.endpoint import DEFAULT_URL, ApiKey, Endpoint, Tls


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Declare where the server is and how to reach it."""
    add = parser.add_argument_group("server").add_argument
    add("--url", default=DEFAULT_URL, metavar="HOST:PORT", help="its gRPC address (default %(default)s)")
    add("--model", metavar="NAME", help="model to ask (default: tensorrt_llm_bls, else ensemble, else tensorrt_llm)")
    add("--tls", action="store_true", help="speak TLS; the three below imply it")
    add("--tls-ca", type=Path, metavar="PEM", help="authority that signed the server's certificate")
    add("--tls-cert", type=Path, metavar="PEM", help="our certificate, for mutual TLS")
    add("--tls-key", type=Path, metavar="PEM", help="our certificate's private key")
    add("--api-key-file", type=Path, metavar="FILE", help="send the API key in this file")
    add("--keepalive", type=float, default=Endpoint.keepalive_s, metavar="SECONDS",
        help="ask a silent server so often whether it lives, 0: never (default %(default)g, which every server takes; "
        "10 is for those that 'minitron serve' started)")  # fmt: skip


def endpoint(args: argparse.Namespace) -> Endpoint:
    """The server that ``add_connection``'s arguments name; raises UsageError, InputError."""
    tls = Tls(args.tls_ca, args.tls_cert, args.tls_key)
    key = ApiKey(api_keys.sent(args.api_key_file)) if args.api_key_file else None
    return Endpoint(args.url, tls if args.tls or tls != Tls() else None, key, args.keepalive)
