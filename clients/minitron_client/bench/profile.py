"""What a load does, as one strict document: an unknown key is an error, every field is described.

A profile is YAML; flags and ``--set PATH=VALUE`` replace single values of it. Four ship with the toolkit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from minitron import documents
from minitron.errors import InputError, UsageError

_FOLDER = "minitron_client/bench/profiles"
FIXED_LENGTH = "every answer has exactly its output length (min_tokens = max_tokens, end token ignored)"


def _field(default: Any, about: str, **limits: Any) -> Any:
    return Field(default, description=about, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Length(_Section):
    """A distribution of lengths in tokens; a bare number in YAML means ``fixed``."""

    kind: Literal["fixed", "uniform", "normal", "lognormal"] = "fixed"
    mean: float = _field(64, ge=1, about="of the lengths themselves; not used by uniform")
    deviation: float = _field(0, ge=0, about="standard deviation, for normal and lognormal")
    low: int = _field(1, ge=1, about="shortest; shorter ones become it")
    high: int = _field(1 << 20, ge=1, about="longest; longer ones become it")

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Arrival(_Section):
    """When requests are sent."""

    kind: Literal["closed", "constant", "poisson", "gamma", "ramp", "trace"] = _field(
        "poisson",
        about="closed: as soon as another has ended; all others follow a schedule made before the run",
    )
    concurrency: int = _field(4, ge=1, about="closed: streams at once")
    requests: int = _field(100, ge=1, about="closed: how many in all")
    rate: float = _field(1.0, gt=0, about="requests/s of constant, poisson and gamma; where a ramp starts")
    to_rate: float = _field(10.0, gt=0, about="ramp: where it ends")
    burstiness: float = _field(1.0, gt=0, about="gamma: its shape; below 1 burstier than Poisson, above 1 smoother")
    trace: Path | None = _field(None, about="trace: JSONL (Mooncake's fields) or CSV (Azure's)")
    speed: float = _field(1.0, gt=0, about="trace: 2 replays it twice as fast")


class Prompts(_Section):
    """Where prompts come from."""

    kind: Literal["synthetic", "file", "sharegpt"] = _field(
        "synthetic",
        about="synthetic: common words, exactly input_tokens long; file: JSONL with a prompt (and max_tokens) per "
        "line; sharegpt: first turns of conversations",
    )
    path: Path | None = _field(None, about="of a file or sharegpt source")


class Slo(_Section):
    """Limits in ms that a good request meets jointly; one that is left out is no limit."""

    ttft_ms: float | None = _field(None, gt=0, about="time to first token, from the intended send")
    tpot_ms: float | None = _field(None, gt=0, about="time per output token")
    e2e_ms: float | None = _field(None, gt=0, about="end to end, from the intended send")


class Profile(_Section):
    """One load test. Times in seconds."""

    description: str = _field("", about="what it is for")
    arrival: Arrival = _field(Arrival(), about="when requests are sent")
    duration_s: float = _field(30.0, gt=0, about="how long requests are sent (closed: at most)")
    warm_up_s: float = _field(5.0, ge=0, about="requests meant for the first seconds do not count")
    input_tokens: Length = _field(Length(mean=64), about="prompt lengths")
    output_tokens: Length = _field(Length(mean=32), about="answer lengths")
    fixed_output: bool = _field(True, about="every answer has exactly its output length (end token ignored)")
    temperature: float | None = _field(None, ge=0, about="0 or none: greedy, as the server's default")
    prompts: Prompts = _field(Prompts(), about="where prompts come from")
    slo: Slo = _field(Slo(), about="what makes a request a good one")
    deadline_s: float | None = _field(60.0, gt=0, about="a request that takes longer is given up, and failed")
    seed: int = _field(0, ge=0, about="same seed, same requests and schedule, to the byte")
    workers: int = _field(1, ge=1, le=64, about="processes that send")
    stop_when_saturated: bool = _field(True, about="end early when TTFT and requests in flight keep rising")

    @property
    def lengths(self) -> str:
        """What is said of the answers' lengths beside every result."""
        return FIXED_LENGTH if self.fixed_output else "answers end where the model does"

    @field_validator("input_tokens", "output_tokens", mode="before")
    @classmethod
    def _number_is_fixed(cls, value: Any) -> Any:
        return {"kind": "fixed", "mean": value} if isinstance(value, (int, float)) else value

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.warm_up_s >= self.duration_s:
            raise ValueError(f"warm_up_s {self.warm_up_s:g} leaves nothing of duration_s {self.duration_s:g}")
        if self.arrival.kind == "trace" and self.arrival.trace is None:
            raise ValueError("arrival.trace names no file")
        if self.prompts.kind != "synthetic" and self.prompts.path is None:
            raise ValueError(f"prompts.path names no file for prompts of kind {self.prompts.kind}")
        return self


def shipped() -> list[str]:
    """Names of the profiles that come with the toolkit."""
    return documents.shipped(_FOLDER)


def load(name: str | None, settings: Sequence[tuple[str, Any]] = ()) -> Profile:
    """Read a shipped profile or a file (None: the defaults), then put ``settings`` (path, value) in their places.

    Raises InputError for the document, UsageError for the settings.
    """
    document = documents.read(name, _FOLDER, "load profile")[1] if name else {}
    for path, value in settings:
        documents.put(document, path, value)
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(step) for step in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "there is no such key"
        given = {name.partition(".")[0] for name, _ in settings}
        kind = UsageError if path.partition(".")[0] in given else InputError
        raise kind(f"load profile {name or ''}: {path or 'it'}: {message}") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """Split ``PATH=VALUE``; raises UsageError."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UsageError(f"--set {text!r}: write PATH=VALUE, such as arrival.rate=5")
    try:
        return path, documents.parse(value, repr(value))
    except InputError as error:
        raise UsageError(f"--set {text!r}: {error}") from None
