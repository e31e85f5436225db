"""Where the server is and how to reach it: address, TLS, API key, gRPC options, and when to try again."""

from __future__ import annotations

import math
import random
import re
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from minitron.errors import NotReady, Rejected, UsageError, values_as_input
from minitron.text import credentials
from minitron.text.channel import API_KEY, DEFAULT_URL, PATIENT_KEEPALIVE_S, Options, key_header, options

# Questions about the server (metadata, readiness) answer at once or not at all.
QUESTION_DEADLINE_S = 10.0
_LONGEST_KEEPALIVE_S = 86400.0


@dataclass(frozen=True)
class Tls:
    """Files in PEM: ``ca`` that signed the server (None: the system's), ``cert`` and ``key`` of ours for mutual TLS."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raises InputError, UsageError."""
        if (self.cert is None) != (self.key is None):
            raise UsageError("mutual TLS needs both the client's certificate and its key")
        with values_as_input():
            return grpc.ssl_channel_credentials(*credentials.pem(self.ca, self.cert, self.key))

    def context(self) -> ssl.SSLContext:
        """The same for HTTPS; raises InputError, UsageError."""
        self.credentials()  # names a file that cannot be
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert:
            context.load_cert_chain(self.cert, self.key)
        return context


@dataclass(frozen=True)
class ApiKey:
    """What Triton's ``--grpc-restricted-protocol=PROTOCOLS:NAME=VALUE`` asks for."""

    value: str = field(repr=False)
    name: str = API_KEY

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC header of the key; raises UsageError for what a header cannot hold."""
        if not re.fullmatch(r"[0-9a-z._-]+", self.name):
            raise UsageError(f"the API key's name {self.name!r} may hold only a-z, 0-9 and . _ -")
        if not re.fullmatch(r"[\x21-\x7e]+", self.value):
            raise UsageError("the API key's value may hold only visible ASCII characters")
        return ((key_header(self.name), self.value),)


@dataclass(frozen=True)
class Retry:
    """How often and how soon to send again what the server has not taken (it was absent, or full)."""

    attempts: int = 3
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0

    def delay_s(self, error: Exception, tried: int, left_s: float | None) -> float | None:
        """Seconds to wait after ``tried`` attempts, or None to give up; ``left_s`` is what the deadline leaves."""
        if not isinstance(error, (NotReady, Rejected)) or tried >= self.attempts:
            return None
        delay = min(self.first_delay_s * 2 ** (tried - 1), self.max_delay_s) * random.uniform(0.5, 1.0)
        return delay if left_s is None or delay < left_s else None


class Deadline:
    """A point on the monotonic clock, ``seconds`` from now, or never."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
            raise UsageError(f"a deadline of {seconds!r} s cannot be kept; give a number above 0, or None")
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, at least 0; None without a deadline."""
        return None if self._at is None else max(self._at - time.monotonic(), 0.0)

    @property
    def question_s(self) -> float:
        """Seconds that a question about the server may take."""
        return QUESTION_DEADLINE_S if self.left_s is None else min(self.left_s, QUESTION_DEADLINE_S)


@dataclass(frozen=True)
class Endpoint:
    """One server: ``url`` is HOST:PORT of its gRPC endpoint.

    ``keepalive_s``: how often a server that owes an answer and is silent is asked whether it lives, 0: never. One of
    'minitron serve' may be asked every 10 s; the default is as often as any server may be.
    """

    url: str = DEFAULT_URL
    tls: Tls | None = None
    api_key: ApiKey | None = None
    keepalive_s: float = PATIENT_KEEPALIVE_S

    def __post_init__(self) -> None:
        if "://" in self.url or not re.fullmatch(r".+:\d+", self.url):
            raise UsageError(f"{self.url!r} is no HOST:PORT; give the gRPC address, such as {DEFAULT_URL}")
        if self.keepalive_s and not 1 <= self.keepalive_s <= _LONGEST_KEEPALIVE_S:
            raise UsageError(
                f"a keepalive of {self.keepalive_s!r} s cannot be; give 1 to {_LONGEST_KEEPALIVE_S:g} s, or 0 for none"
            )

    @classmethod
    def of(cls, url: str | Endpoint, tls: Tls | None, api_key: ApiKey | None, keepalive_s: float) -> Endpoint:
        """From the arguments of a client; raises UsageError where some of them would be overlooked."""
        if not isinstance(url, Endpoint):
            return cls(url, tls, api_key, keepalive_s)
        if tls or api_key:
            raise UsageError("an Endpoint says by itself how to connect: give tls and api_key to it, not beside it")
        return url

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC headers of every call."""
        return self.api_key.metadata if self.api_key else ()

    def channel(self) -> grpc.Channel:
        """A new blocking channel; it connects with the first call."""
        if self.tls:
            return grpc.secure_channel(self.url, self.tls.credentials(), options=self._options)
        return grpc.insecure_channel(self.url, options=self._options)

    def aio_channel(self) -> grpc.aio.Channel:
        """A new channel of the running event loop; it connects with the first call."""
        if self.tls:
            return grpc.aio.secure_channel(self.url, self.tls.credentials(), options=self._options)
        return grpc.aio.insecure_channel(self.url, options=self._options)

    @property
    def _options(self) -> Options:
        return options(self.url, self.keepalive_s, proxies=True)
