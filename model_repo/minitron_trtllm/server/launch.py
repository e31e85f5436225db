"""What is served, with which options, and what it takes to start it: plain data.

``bundled`` and ``container`` each turn a ``Served`` and ``Options`` into a ``Launch``; ``supervisor`` runs any of them.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from minitron_trtllm import manifest
from minitron_trtllm.errors import InputError, RepositoryError, UsageError

#: Marks every process and shared-memory segment of one server (environment variable, see ``leftovers``).
MARK_VARIABLE = "MINITRON_SERVER"
#: Name of the header that carries the API key: this over HTTP, with ``triton-grpc-protocol-`` before it over gRPC.
API_KEY_HEADER = "api-key"

log = logging.getLogger(__name__)

#: Seconds that unloading the models may take after the exit timeout for the streams, and what each line adds: Triton
#: ends the instances of a Python model one after the other and sleeps a second for each.
UNLOAD_S = 10
_UNLOAD_LINE_S = 1.25
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    """A rendered model repository as the server needs to know it (its manifest's details).

    ``root`` is where the rendered configs say that the repository lies; ``max_streams`` how many requests the BLS
    front works on at once, ``image`` the container image that the repository was rendered for.
    """

    folder: Path
    backend: str
    models: tuple[str, ...]
    front: str
    root: Path
    world_size: int
    max_streams: int
    image: str | None
    lines: int = 0

    def exit_timeout_s(self, streams_s: int) -> int:
        """Triton's exit timeout: seconds for the streams in flight, and for ending the front's lines after them."""
        return streams_s + math.ceil(_UNLOAD_LINE_S * self.lines)

    @property
    def engine(self) -> Path:
        """The engine folder (there is none for llmapi)."""
        return self.folder / "engine"

    @classmethod
    def read(cls, folder: Path) -> Served:
        """Read the repository's manifest; raises RepositoryError."""
        folder = Path(os.path.abspath(folder))
        if not folder.is_dir():
            raise RepositoryError(f"{folder} is not a folder; 'minitron repo render' makes a model repository")
        try:
            details = manifest.read(folder, "repository").details
        except InputError as error:
            raise RepositoryError(str(error)) from error
        try:
            return cls(
                folder, details["backend"], tuple(details["models"]), details["front"], Path(details["root"]),
                int(details["world_size"]), int(details["bls_max_concurrency"]),
                details.get("image"), int(details.get("lines", 0)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryError(f"{folder / manifest.NAME} lacks {error}; render the repository again") from error


@dataclass(frozen=True)
class Tls:
    """PEM files for gRPC; with ``ca`` a client must show a certificate that it signed (mutual TLS)."""

    certificate: Path
    key: Path
    ca: Path | None = None


@dataclass(frozen=True)
class Ports:
    """TCP ports; the defaults are Triton's own."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002


@dataclass(frozen=True)
class Options:
    """What the user chose for one server.

    ``gpus`` is what ``docker run --gpus`` takes. ``server_key`` guards the interfaces that no client needs; it is made
    anew for each server. Neither it nor ``api_key`` is in any representation.
    """

    host: str = _LOOPBACK
    tls: Tls | None = None
    api_key: str | None = field(default=None, repr=False)
    exit_timeout_s: int = 30
    ready_timeout_s: int = 600
    gpus: str = "all"
    verbose: bool = False
    server_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def http_host(self) -> str:
        """HTTP and metrics have no TLS in Triton, so with TLS they stay on the loopback address."""
        return _LOOPBACK if self.tls else self.host

    @property
    def probe_host(self) -> str:
        """The address at which this machine itself reaches HTTP."""
        return _LOOPBACK if self.http_host == "0.0.0.0" else self.http_host


@dataclass(frozen=True)
class Launch:
    """One server, ready to be started: ``argv`` and ``environment`` of the child.

    ``container`` is the container's name, or None for a server that runs here. ``secrets`` must not be shown.
    """

    mark: str
    argv: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    container: str | None
    secrets: tuple[str, ...] = field(repr=False)

    def shown(self) -> list[str]:
        """``argv`` with every secret replaced by stars."""
        words = list(self.argv)
        for secret in self.secrets:
            words = [word.replace(secret, "***") for word in words]
        return words


def new_mark() -> str:
    """A name for one server that no other server has."""
    return secrets.token_hex(6)


def check_host(host: str) -> str:
    """Accept an IPv4 address to listen on; raises UsageError."""
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise UsageError(f"--host {host} is no IPv4 address; 127.0.0.1 is this machine alone, 0.0.0.0 all") from None


def read_tls(certificate: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """Check the three TLS files as far as their presence goes; raises UsageError, InputError."""
    if certificate is None and key is None and ca is None:
        return None
    if certificate is None or key is None:
        raise UsageError("TLS needs both --tls-cert and --tls-key; --tls-ca adds the demand for client certificates")
    for path in filter(None, (certificate, key, ca)):
        if b"-----BEGIN " not in path.read_bytes():
            raise InputError(f"{path} is no PEM file")
    return Tls(certificate.resolve(), key.resolve(), ca.resolve() if ca else None)


def read_api_key(path: Path | None) -> str | None:
    """Read the one line of an API key file; raises InputError."""
    if path is None:
        return None
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others; 'chmod 600' it", path)
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{path} must hold one line of at least 16 printable ASCII characters without spaces")
    return key
