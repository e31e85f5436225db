"""What a gateway is told: plain data that its worker processes get whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minitron.errors import UsageError
from minitron.text.engine import Address


@dataclass(frozen=True)
class Limits:
    """What clients may take of one worker: bytes of a body, sequences of a request, sequences in flight."""

    body_bytes: int = 8 << 20
    sequences: int = 128
    streams: int = 1024


@dataclass(frozen=True)
class Interval:
    """How often a stream's text is sent: ``tokens`` at least together, or ``seconds`` apart; 1 and 0: as it comes."""

    tokens: int = 1
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Interval:
        """From ``8`` (tokens) or ``50ms``; raises UsageError."""
        number = text.removesuffix("ms")
        if not (number.isascii() and number.isdigit()) or not 0 < int(number) <= 10_000:
            raise UsageError(f"--stream-interval {text!r} is neither a number of tokens (8) nor of ms (50ms)")
        return cls(seconds=int(number) / 1000) if text.endswith("ms") else cls(tokens=int(number))


@dataclass(frozen=True)
class Settings:
    """``parameters`` are those of the text model (its limits, and the engine's name); ``model`` the name that clients
    use. ``keys``: SHA-256 of the bearer keys, none: everybody may ask. ``cert`` and ``tls_key``: PEM files for HTTPS.
    ``keep_alive_s``: how long a stream may be silent before a comment is sent on it, 0: for ever.
    """

    host: str
    port: int
    upstreams: tuple[Address, ...]
    tokenizer: str
    parameters: Mapping[str, str]
    model: str
    workers: int = 1
    limits: Limits = Limits()
    interval: Interval = Interval()
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)
    cert: str = ""
    tls_key: str = ""
    drain_s: float = 30.0
    keep_alive_s: float = 15.0

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http{'s' if self.cert else ''}://{self.host}:{self.port}/v1"
