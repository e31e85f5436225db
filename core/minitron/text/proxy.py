"""Proxies of the environment: which variable, if any, stands between this process and an address.

A server at a loopback address is on this machine, where no proxy can help; but gRPC and most HTTP libraries send even
that to the proxy that ``http_proxy`` names. So here a loopback address is always reached directly, and a message about
any other that could not be reached names the variable, never its value: that may hold a password.

Rules: those of gRPC (its environment_variables.md, ``http_proxy_mapper.cc`` of 1.85: lower case only, ``grpc_proxy``
before ``https_proxy`` before ``http_proxy``, the first that is set decides, URLs of scheme http alone), and those of
``urllib.request`` (any case, lower case first). ``no_proxy`` is read as the most generous of them reads it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence

_GRPC = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPT = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an IP address, also in the old forms of inet_aton) is this very machine's loopback.

    So is 0.0.0.0, which Linux connects to itself.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name in ("localhost", "ip6-localhost", "ip6-loopback") or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and (address.is_loopback or address.is_unspecified)


def of_grpc(url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable by which gRPC reaches HOST:PORT through a proxy; None where it goes there directly."""
    variable = next((name for name in _GRPC if name in environment), None)
    if variable is None or not environment[variable].lower().startswith("http://") or _is_direct(url, environment):
        return None
    return variable


def of_http(url: str, environment: Mapping[str, str] = os.environ, *, kinds: Sequence[str] = ("http",)) -> str | None:
    """The variable by which a client of HTTP reaches HOST:PORT through a proxy; None where it goes there directly.

    ``kinds``: ``http`` or ``https`` as the URL has it, then ``all`` for a client that heeds ``all_proxy``.
    """
    variable = next(filter(None, (_of_kind(kind, environment) for kind in kinds)), None)
    return None if variable is None or _is_direct(url, environment) else variable


def _of_kind(kind: str, environment: Mapping[str, str]) -> str | None:
    """The lower case name where it is set, though to nothing; else the upper case one."""
    lower, upper = f"{kind}_proxy", f"{kind.upper()}_PROXY"
    if lower not in environment and upper == "HTTP_PROXY" and "REQUEST_METHOD" in environment:
        return None  # a web server runs this, and the variable may be a header of a request (CVE-2016-1000110)
    name = lower if lower in environment else upper
    return name if environment.get(name) else None


def advice(variable: str | None, url: str) -> str:
    """What a message about ``url`` says where a proxy may be why it was not reached; empty without a variable."""
    if variable is None:
        return ""
    host, _ = _host_and_port(url)
    return f"; {variable} in the environment sends this to a proxy: unset it, or put {host} into no_proxy"


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Meanwhile this process's environment names no proxy: for a library that reads it and should not."""
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _is_direct(url: str, environment: Mapping[str, str]) -> bool:
    host, port = _host_and_port(url)
    named = ",".join(environment.get(name, "") for name in _EXCEPT).lower()
    entries = [entry for entry in re.split(r"[,\s]+", named) if entry]
    return is_loopback(host) or any(_covers(entry, host, port) for entry in entries)


def _covers(entry: str, host: str, port: str) -> bool:
    """Whether an entry of no_proxy (a host, a domain, an address, a network, each with or without a port) is for it."""
    if entry == "*" or entry in (f"{host}:{port}", f"[{host}]:{port}"):
        return True
    if (address := _address(host)) is not None:
        try:
            return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    domain = entry.removesuffix(f":{port}").removeprefix("*").lstrip(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _host_and_port(url: str) -> tuple[str, str]:
    """Of HOST:PORT, with or without gRPC's name of a resolver before it."""
    host, _, port = re.sub(r"^(dns|ipv4|ipv6):(?=.*:)", "", url.lower()).rpartition(":")
    return host.strip("[]").rstrip("."), port


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, 0x7f000001
        except (OSError, ValueError):
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
