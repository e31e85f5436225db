"""A sequence while the engine works on it, and what it gives to whoever asked for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.model.runtime_limits import blocks_of
from minitron.text.log_probs import log_softmax

from .context_logits import Logits
from .generation_request import Request
from .speculation import Drafts

log = logging.getLogger(__name__)

END_ID, STOP_WORDS, LENGTH, CANCELLED = "end_id", "stop_words", "length", "cancelled"


@dataclass(frozen=True)
class StepOutput:
    """What one step gave to one sequence. The last chunk has ``finish`` or ``error``, and may have no token.

    ``context_logits`` [prompt, vocabulary]: with the first one, where they were asked for.
    """

    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    finish: str | None = None
    error: str | None = None
    context_logits: Logits | None = None

    @property
    def is_last(self) -> bool:
        """Whether the sequence is over."""
        return self.finish is not None or self.error is not None


@dataclass
class Times:
    """Moments of a sequence's life, in ns of the monotonic clock; 0 = not yet."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(eq=False)
class Generation:
    """A sequence in the engine. ``deliver`` is called with each chunk, from the stepping thread as a rule.

    ``handle``: of the pipeline's request, which may give ``asked`` tokens and gave ``read``; where it ends before the
    sequence does, another one goes on (``next_part``). ``drafts``: with prompt lookup, once it is let in.
    ``lingers``: it is answered, and the pipeline still reads its prompt (see ``Engine._end``).
    """

    id: int
    request: Request
    deliver: Callable[[StepOutput], None]
    times: Times
    token_ids: list[int] = field(default_factory=list)
    context_logits: Logits | None = None
    handle: Any = None
    asked: int = 0
    read: int = 0
    drafts: Drafts | None = None
    cancelled: bool = False
    answered: bool = False
    lingers: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of the KV cache that its prompt and its longest output fill."""
        return blocks_of(len(self.request.prompt) + self.request.max_new_tokens)

    def next_part(self) -> Request:
        """What to ask of the pipeline now: what is left to generate, behind the prompt and the tokens so far.

        In steps with drafts the pipeline bans end ids at places that are not among the first ``min_tokens``, and does
        not at some that are. So those are asked for by themselves, and an end id among them is dropped. The seed is
        another one behind the first part, for numbers that were not drawn yet.
        """
        request, count = self.request, len(self.token_ids)
        least = max(0, request.min_tokens - count)
        self.read, self.asked = 0, request.max_new_tokens - count
        if self.drafts and request.end_ids and least:
            self.asked = least
        return replace(
            request,
            prompt=[*request.prompt, *self.token_ids],
            max_new_tokens=self.asked,
            min_tokens=least,
            seed=(request.seed + count) % (1 << 64),
        )

    def count(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Note the tokens of a step; return how many were drafted for it and how many of those were right."""
        counts = (0, 0)
        if self.drafts:
            counts = self.drafts.take(tokens, self.asked - self.read, is_first=not self.read)
        self.read += len(tokens)
        return counts

    def take(self, tokens: Sequence[int], log_probs: Sequence[float]) -> StepOutput:
        """Keep the tokens of a step up to where the sequence ends, and return them.

        An end id among the first ``min_tokens`` ends a part (``next_part``), not the sequence.
        """
        before, finish = len(self.token_ids), None
        for token in tokens:
            if token in self.request.end_ids:
                finish = END_ID if len(self.token_ids) >= self.request.min_tokens else None
                break
            self.token_ids.append(token)
            if finish := self.finish_after_token():
                break
        kept = self.token_ids[before:]
        return StepOutput(tuple(kept), tuple(log_probs[: len(kept)]), finish)

    @property
    def rows(self) -> int:
        """Rows that it may take in a step that reads no prompt: its next token's, and those of the drafts."""
        return 1 + (self.drafts.count if self.drafts else 0)

    def answer(self, chunk: StepOutput) -> None:
        """Deliver a chunk, the first one with the prompt's logits; nobody gets those behind the last one."""
        if self.context_logits is not None and chunk.error is None:
            chunk, self.context_logits = replace(chunk, context_logits=self.context_logits), None
        self.answered = chunk.is_last
        try:
            self.deliver(chunk)
        except Exception:
            log.exception("a chunk could not be delivered; its request is cancelled")
            self.cancelled = True
        if self.answered:
            self.deliver = _to_nobody

    def finish_after_token(self) -> str | None:
        """How the token that came last ends the sequence, None where it goes on."""
        request, ids = self.request, self.token_ids
        if any(tuple(ids[-len(word) :]) == word for word in request.stop_words):
            return STOP_WORDS
        return LENGTH if len(ids) == request.max_new_tokens else None

    def likeliest(self, logits: Logits) -> StepOutput:
        """The answer of one token that the logits [vocabulary] behind the prompt name, which need not be read again."""
        self.times.first_scheduled_ns = self.times.arrival_ns
        self.times.first_token_ns = self.times.last_token_ns = time.monotonic_ns()
        token = int(logits.argmax())
        if token in self.request.end_ids:
            return StepOutput(finish=END_ID)
        self.token_ids.append(token)
        return StepOutput((token,), (float(log_softmax(logits)[token]),), self.finish_after_token())


def _to_nobody(chunk: StepOutput) -> None:
    """Who takes the chunks after the last one.

    A receiver that knows its generation would be kept alive by it until Python's garbage collector comes; with it, in
    Triton, a response sender, and one that is left to the end of the process crashes there.
    """
