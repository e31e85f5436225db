"""What is served, with which options, and what it takes to start it: plain data.

``bundled`` and ``container`` each turn a ``Served`` and ``Options`` into a ``Launch``; ``supervisor`` runs any of them.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minitron import api_keys
from minitron.artifacts import manifest
from minitron.errors import InputError, RepositoryError, UsageError
from minitron.text.channel import GRPC_PORT, HTTP_PORT, METRICS_PORT
from minitron_triton.server import triton_flags
from minitron_triton.server.tls import Tls
from minitron_triton.server.traces import Traces

#: Marks every process and shared-memory segment of one server (environment variable, see ``leftovers``).
MARK_VARIABLE = "MINITRON_SERVER"
#: How often the server was started again after a crash, for the models to put into a metric (environment variable).
RESTARTS_VARIABLE = "MINITRON_RESTARTS"
#: Seconds after the exit timeout in which the supervisor sees that the last stream ended, or ends the server.
GRACE_S = 2
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"
_ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Served:
    """A rendered model repository as the server needs to know it (its manifest's details).

    ``root`` is where the rendered configs say that the repository lies; ``image`` the container image that the
    repository was rendered for, ``shm_bytes`` the size of /dev/shm in it.
    """

    folder: Path
    backend: str
    models: tuple[str, ...]
    front: str
    root: Path
    world_size: int
    image: str | None
    shm_bytes: int

    @property
    def engine(self) -> Path:
        """The engine folder (there is none for llmapi)."""
        return self.folder / "engine"

    @property
    def fronts(self) -> tuple[str, ...]:
        """The models that ask others for what they answer."""
        return tuple(model for model in self.models if model in (self.front, _ENSEMBLE))

    @classmethod
    def read(cls, folder: Path) -> Served:
        """Read the repository's manifest; raises RepositoryError."""
        folder = Path(os.path.abspath(folder))
        if not folder.is_dir():
            raise RepositoryError(f"{folder} is not a folder; 'minitron render' makes a model repository")
        try:
            details = manifest.read(folder, "repository").details
        except InputError as error:
            raise RepositoryError(str(error)) from error
        try:
            return cls(
                folder, details["backend"], tuple(details["models"]), details["front"], Path(details["root"]),
                int(details["world_size"]), details.get("image"),
                int(details["shm_bytes"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryError(f"{folder / manifest.NAME} lacks {error}; render the repository again") from error


@dataclass(frozen=True)
class Ports:
    """TCP ports; the defaults are Triton's own."""

    grpc: int = GRPC_PORT
    http: int = HTTP_PORT
    metrics: int = METRICS_PORT


@dataclass(frozen=True)
class Options:
    """What the user chose for one server.

    ``metrics_host``: where the metrics listen, if not where HTTP does. ``gpus`` is what ``docker run --gpus`` takes,
    ``environment`` the recipe's for containers. ``api_key_file`` is where a model of the server reads ``api_key``.
    ``server_key`` guards the interfaces that no client needs; it is made anew for each server. ``triton_flags`` are
    the user's own for tritonserver, as ``triton_flags.read`` gives them. Neither key nor these are in any
    representation.
    """

    host: str = _LOOPBACK
    metrics_host: str | None = None
    tls: Tls | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    exit_timeout_s: int = 30
    ready_timeout_s: int = 600
    restarts: int = 3
    gpus: str = "all"
    environment: Mapping[str, str] = field(default_factory=dict)
    verbose: bool = False
    traces: Traces | None = None
    triton_flags: tuple[str, ...] = field(default=(), repr=False)
    server_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def http_host(self) -> str:
        """HTTP and metrics have no TLS in Triton, so with TLS they stay on the loopback address."""
        return _LOOPBACK if self.tls else self.host

    @property
    def metrics_bind(self) -> str:
        """The address that the metrics listen on; they hold no secret, so one may be chosen beside TLS."""
        return self.metrics_host or self.http_host

    @property
    def probe_host(self) -> str:
        """The address at which this machine itself reaches HTTP."""
        return reachable(self.http_host)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown."""
        return tuple(filter(None, (self.api_key, self.server_key, *triton_flags.secrets(self.triton_flags))))


@dataclass(frozen=True)
class Launch:
    """One server, ready to be started: ``argv`` and ``environment`` of the child.

    ``container`` is the container's name, or None for a server that runs here. ``secrets`` must not be shown.
    """

    mark: str
    argv: tuple[str, ...] = field(repr=False)
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


def reachable(host: str) -> str:
    """Where a client on the server's own machine finds what listens on ``host``."""
    return _LOOPBACK if host == _EVERYWHERE else host


def loopback(address: str, tls: Tls | None, api_key_file: Path | None) -> dict[str, str]:
    """Environment variables by which a model of the server calls that server over gRPC.

    Files are named, not quoted, and so is the key's: others may read the environment of a process, but not the file.
    They take the place of all that the environment says of another server (``without_loopback``).
    """
    values: dict[str, object] = {"MINITRON_GRPC": address}
    if tls:
        values |= {"MINITRON_GRPC_CA": tls.certificate, "MINITRON_GRPC_AUTHORITY": tls.name}
        if tls.ca:
            values |= {"MINITRON_GRPC_CERT": tls.loopback_certificate, "MINITRON_GRPC_KEY": tls.loopback_key}
    if api_key_file:
        values["MINITRON_GRPC_API_KEY_FILE"] = api_key_file
    return {name: str(value) for name, value in values.items()}


def without_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of ``loopback``, which a shell may still have of another server."""
    return {name: value for name, value in environment.items() if not name.startswith("MINITRON_GRPC")}


def check_host(host: str, flag: str = "--host") -> str:
    """Accept an IPv4 address to listen on; raises UsageError."""
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise UsageError(f"{flag} {host} is no IPv4 address; 127.0.0.1 is this machine alone, 0.0.0.0 all") from None


def read_api_key(path: Path | None) -> str | None:
    """Read the one line of an API key file; raises InputError."""
    return None if path is None else api_keys.demanded_alone(path)
