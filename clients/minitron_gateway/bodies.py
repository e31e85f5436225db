"""What may be asked: the bodies of ``/v1/completions`` and ``/v1/chat/completions``, checked, and as a Sampling.

A parameter that is not known is refused by name, and so is one that the engine has nothing for: nothing is dropped in
silence, save ``user``, which names an end user to whoever keeps accounts.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from minitron.text.completion import Sampling

_INT32 = 2**31 - 1
_INT64 = 2**63
#: Below it a temperature is greedy: that is its limit, and engines divide by it.
_LEAST_TEMPERATURE = 1e-5
#: What is closer to 0 is 0, or has lost its digits, in the engine's float32.
_LEAST_FLOAT32 = 1.2e-38
_OPENAI_MAX_TOKENS = 16  # the default of /v1/completions
MOST_STOPS = 16
MOST_CHOICES = 128


class StreamOptions(BaseModel):
    """``include_usage``: a last event with the counts; ``continuous_usage_stats``: every event with those of its choice
    so far (vLLM's)."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS_SCHEMA,
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}
_STOP = {"type": "string", "minLength": 1}
_STOP_SCHEMA = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}, {"type": "null"}]}
_TOKEN_IDS = Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})


def _prompt(value: Any) -> Any:
    """One message for what is none of the four, where pydantic would list what is wrong with each."""
    if isinstance(value, str) or _are_ids(value):
        return value
    if isinstance(value, list) and value and (all(isinstance(one, str) for one in value) or all(map(_are_ids, value))):
        return value
    raise ValueError("must be a text, a list of token ids, or a list of either")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _stop(value: Any) -> Any:
    """The same for stop texts; one text or several are several."""
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return None
    if not (isinstance(texts, list) and len(texts) <= MOST_STOPS and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"must be a text, or a list of up to {MOST_STOPS} texts")
    if not all(texts):
        raise ValueError("a stop text is empty")
    return texts


class _Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop), WithJsonSchema(_STOP_SCHEMA)] = None
    seed: Annotated[int, Field(ge=-_INT64, lt=2 * _INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float | None, WithJsonSchema({"enum": [0, None]})] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=_LEAST_FLOAT32, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _TOKEN_IDS] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @field_validator("min_p")
    @classmethod
    def _no_min_p(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("tensorrt_llm has no such input; leave it out, or use top_p")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"{key[:20]!r} is no token id")
        return value

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def streams(self) -> bool:
        """Whether the text is wanted as it comes."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def counts_on(self) -> bool:
        """Whether every event of a stream has counts."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def sequences(self) -> int:
        """Sequences that are generated for each prompt."""
        return self.choices

    @property
    def moved_by(self) -> list[str]:
        """What of the parameters makes that a chosen token need not be the one with the highest log prob."""
        asked = {
            "a temperature above 0": self._temperature > 0,
            "min_tokens": bool(self.min_tokens),
            "logit_bias": bool(self.logit_bias),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "repetition_penalty": (self.repetition_penalty or 1) != 1,
        }
        return [what for what, is_asked in asked.items() if is_asked]

    @property
    def _temperature(self) -> float:
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return 0.0 if temperature < _LEAST_TEMPERATURE or top_p < _LEAST_FLOAT32 else temperature

    def sampling(self, max_tokens: int, *, log_probs: bool) -> Sampling:
        """What the engine is asked; without a seed one by chance, for the engine's own default is always the same."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self._temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (2 * _INT64),
            min_tokens=self.min_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop_words=tuple(self.stop or ()),
            bias={int(token): weight for token, weight in (self.logit_bias or {}).items()},
            ignore_end=bool(self.ignore_eos),
            log_probs=log_probs,
            streams=self.streams or bool(self.stop),
        )


class CompletionBody(_Body):
    """``/v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError(f"best_of: {self.best_of} is less than n ({self.choices})")
        if self.streams and self.sequences > self.choices:
            raise ValueError("best_of: the best are known at the end; it cannot be streamed")
        _check_least(self, self.most_tokens)
        if not (self.echo and self.max_tokens == 0):  # a prompt's tokens have all of them
            _check_alternatives(self, "logprobs", self.logprobs or 0)
        return self

    @property
    def sequences(self) -> int:
        """Sequences that are generated for each prompt, of which the best ``choices`` are answered."""
        return self.best_of or self.choices

    @property
    def most_tokens(self) -> int:
        """How long an answer may be."""
        return _OPENAI_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ContentPart(BaseModel):
    """A part of a message; text is all that there is."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatBody(_Body):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        _check_least(self, self.most_tokens)
        _check_alternatives(self, "top_logprobs", self.top_logprobs or 0)
        return self

    @property
    def most_tokens(self) -> int | None:
        """How long the answer may be, None: what is left of the model's length."""
        return self.max_completion_tokens or self.max_tokens


def _check_least(body: _Body, most: int | None) -> None:
    if most is not None and (body.min_tokens or 0) > most:
        raise ValueError(f"min_tokens: {body.min_tokens} is more than the {most} tokens that may come (max_tokens)")


def _check_alternatives(body: _Body, name: str, count: int) -> None:
    moved = " and ".join(body.moved_by)
    if count > 1 or (count and moved):
        raise ValueError(
            f"{name}: tensorrt_llm gives the log prob of the chosen token alone"
            f"{f', which need not be the likeliest with {moved}' if moved else ''}; ask for 0, or for 1 with "
            "temperature 0 and without min_tokens, logit_bias and penalties, where the chosen token is the likeliest"
        )
