"""Servers by a name that stands for several, as the headless Service of Kubernetes does: ``dns:///NAME:PORT``.

gRPC's own spelling of a name to be resolved (grpc/doc/naming.md). Each address that it has is a server of its own, so
that the gateway can choose among them; one connection to the name would stay with one of them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

from minitron.text.engine import Address

log = logging.getLogger(__name__)

_SCHEME = "dns:///"


def is_name(address: Address) -> bool:
    """Whether the address is to be looked up."""
    return address.url.startswith(_SCHEME)


def check(url: str) -> str | None:
    """What is wrong with a name, if anything."""
    host, _, port = url.removeprefix(_SCHEME).rpartition(":")
    return (
        None
        if url.startswith(_SCHEME) and host and port.isdigit() and 0 < int(port) < 65536
        else f"{url} is no dns:///NAME:PORT"
    )


class Names:
    """The servers that some addresses stand for; those that are no names stand for themselves."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses
        self._known: dict[str, tuple[Address, ...]] = {}

    @property
    def any(self) -> bool:
        """Whether there is something to look up."""
        return any(map(is_name, self._addresses))

    async def look_up(self) -> list[Address]:
        """All servers now. A name that cannot be looked up stands for what it last stood for."""
        found: list[Address] = []
        for address in self._addresses:
            found += await self._of(address) if is_name(address) else (address,)
        return list({one.url: one for one in found}.values())

    async def _of(self, address: Address) -> tuple[Address, ...]:
        host, _, port = address.url.removeprefix(_SCHEME).rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            told = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            log.debug("%s cannot be looked up (%s)", address.url, error)
            return self._known.get(address.url, ())
        urls = [f"[{where[0]}]:{port}" if family == socket.AF_INET6 else f"{where[0]}:{port}"
                for family, _, _, _, where in told]  # fmt: skip
        # A certificate is for the name, not for the addresses behind it.
        authority = address.authority or (host if address.ca else "")
        self._known[address.url] = tuple(replace(address, url=url, authority=authority) for url in urls)
        return self._known[address.url]
