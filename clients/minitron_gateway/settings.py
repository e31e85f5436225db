"""What a gateway is told: plain data that its worker processes get whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minitron.errors import UsageError
from minitron.text.engine import Address


@dataclass(frozen=True)
class Limits:
    """What clients may take of one worker: bytes of a body, sequences of a request, sequences in flight.

    A request may have as many sequences as may be in flight, at most: what is alone always fits.
    """

    body_bytes: int = 8 << 20
    sequences: int = 128
    streams: int = 1024

    @classmethod
    def shared(cls, body_bytes: int, sequences: int | None, streams: int, workers: int) -> Limits:
        """Those of each of ``workers``, with its share of ``streams``; raises UsageError where that is too small.

        ``sequences`` None: the default, or the share where it is less.
        """
        share, least = streams // workers, sequences or 1
        if share < least:
            raise UsageError(
                f"--max-prompts {least} sequences of a request do not fit into a worker's share of --max-streams "
                f"{streams}, which is {share}: raise --max-streams to {least * workers}, or lower --max-prompts"
                f"{' or --workers' if workers > 1 else ''}"
            )
        return cls(body_bytes, sequences or min(cls.sequences, share), share)


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
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.cert else ''}://{host}:{self.port}/v1"
