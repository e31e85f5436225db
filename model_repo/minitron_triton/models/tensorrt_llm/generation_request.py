"""One sequence to generate, with TensorRT-LLM's meaning of every parameter, and what the engine refuses.

Source of the meanings and defaults: TensorRT-LLM 1.2, ``executor.h`` (SamplingConfig) and
``layers/defaultDecodingParams.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.text.tensors import MESSAGE_BYTES

from .engine_config import EngineConfig

# A logit is multiplied or divided by the repetition penalty, in float32: beyond these it would be infinite, and what is
# sampled from that is anything.
_PENALTIES = (1e-28, 1e28)


class Refused(ValueError):
    """The engine will not take a request; the message says why, in one line."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    ``end_ids``: any of them ends the sequence, none is part of the output, and none comes among the first
    ``min_tokens``; empty: generation does not stop on a token. Stop words are part of the output.
    ``top_k`` 0 and ``top_p`` 0 mean "not given"; with neither, or with ``temperature`` 0, the most probable token is
    taken. ``log_probs``: natural logarithms over the whole vocabulary, before temperature and penalties.
    ``context_logits``: the first chunk brings the logits of the prompt.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    stop_words: tuple[tuple[int, ...], ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int = 0
    context_logits: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken each time."""
        return self.temperature == 0 or self.top_k == 1 or (self.top_k == 0 and self.top_p == 0)

    @property
    def is_the_likeliest_alone(self) -> bool:
        """Whether the answer is the one token that the prompt's last logits name."""
        return self.max_new_tokens == 1 and self.is_greedy and self.repetition_penalty == 1 and self.min_tokens == 0


def check(request: Request, engine: EngineConfig) -> None:
    """Raise Refused for what the engine cannot do; everything is checked here, because OpenVINO checks little.

    Token ids outside the vocabulary or positions past the rotary table would give garbage without an error.
    """
    _check_lengths(request, engine)
    _check_ids(request, engine)
    _check_sampling(request)


def _check_lengths(request: Request, engine: EngineConfig) -> None:
    length, wanted = len(request.prompt), request.max_new_tokens
    if length == 0:
        raise Refused("Prompt is empty: input_ids must have at least one token")
    if wanted < 1:
        raise Refused(f"request_output_len is {wanted}: it must be 1 or more")
    if length > engine.max_input_len:
        raise Refused(f"Prompt length ({length}) exceeds maximum input length ({engine.max_input_len})")
    if length + wanted > engine.max_seq_len:
        raise Refused(
            f"Prompt length ({length}) and requested output length ({wanted}) together exceed the maximum sequence "
            f"length ({engine.max_seq_len})"
        )
    if request.context_logits and (size := 4 * length * engine.vocab_size) > MESSAGE_BYTES:
        raise Refused(
            f"context_logits of {length} tokens are {size:,} bytes, and a response holds at most {MESSAGE_BYTES:,}: "
            f"at most {MESSAGE_BYTES // (4 * engine.vocab_size)} tokens can have them"
        )
    if not 0 <= request.min_tokens <= wanted:
        raise Refused(f"min_tokens is {request.min_tokens}: it must be from 0 to request_output_len ({wanted})")


def _check_ids(request: Request, engine: EngineConfig) -> None:
    size = engine.vocab_size
    if min(request.prompt) < 0 or max(request.prompt) >= size:
        wrong = next(token for token in request.prompt if not 0 <= token < size)
        raise Refused(f"input_ids has token id {wrong}: it must be from 0 to {size - 1}")
    for end in request.end_ids:
        if end >= size:
            raise Refused(f"end_id is {end}: it must be from 0 to {size - 1}")
    for word in request.stop_words:
        if not word or min(word) < 0 or max(word) >= size:
            raise Refused(f"stop_words_list has the word {list(word)}: its token ids must be from 0 to {size - 1}")


def _check_sampling(request: Request) -> None:
    for name, low, high in (
        ("temperature", 0.0, math.inf),
        ("top_p", 0.0, 1.0),
        ("repetition_penalty", *_PENALTIES),
    ):
        value = getattr(request, name)
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise Refused(f"{name} is {value:g}: it must be {bounds}")
    if request.top_k < 0:
        raise Refused(f"top_k is {request.top_k}: it must be 0 or more")
    if not 0 <= request.seed < 1 << 64:
        raise Refused(f"seed is {request.seed}: it must be a number of 64 bits")
