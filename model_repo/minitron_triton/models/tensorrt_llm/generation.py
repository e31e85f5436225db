"""A sequence while the engine works on it, and what it gives to whoever asked for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.text.log_probs import log_softmax

from .context_logits import Logits
from .engine_config import BLOCK_TOKENS
from .generation_request import Request
from .speculation import Drafts

log = logging.getLogger(__name__)

END_ID, STOP_WORDS, LENGTH, CANCELLED = "end_id", "stop_words", "length", "cancelled"


@dataclass(frozen=True)
class Chunk:
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

    ``handle``: of the pipeline's request, ``read`` the tokens that this request gave so far; where it ends before the
    sequence does, another one goes on (``rest``). ``drafts``: where the pipeline has prompt lookup.
    ``lingers``: it is answered, and the pipeline still reads its prompt (see ``Engine._end``).
    """

    id: int
    request: Request
    deliver: Callable[[Chunk], None]
    times: Times
    token_ids: list[int] = field(default_factory=list)
    context_logits: Logits | None = None
    handle: Any = None
    read: int = 0
    drafts: Drafts | None = None
    cancelled: bool = False
    answered: bool = False
    lingers: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of the KV cache that its prompt and its longest output fill."""
        return -(-(len(self.request.prompt) + self.request.max_new_tokens) // BLOCK_TOKENS)

    @property
    def rest(self) -> Request:
        """What is left to generate, behind the prompt and the tokens so far; with no token yet, the request itself.

        The seed is another one, for numbers that were not drawn yet.
        """
        request, count = self.request, len(self.token_ids)
        if not count:
            return request
        return replace(
            request,
            prompt=[*request.prompt, *self.token_ids],
            max_new_tokens=request.max_new_tokens - count,
            min_tokens=max(0, request.min_tokens - count),
            seed=(request.seed + count) % (1 << 64),
        )

    @property
    def rows(self) -> int:
        """Rows that it may take in a step that reads no prompt: its next token's, and those of the drafts."""
        return 1 + (self.drafts.count if self.drafts else 0)

    def answer(self, chunk: Chunk) -> None:
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

    def likeliest(self, logits: Logits) -> Chunk:
        """The answer of one token that the logits [vocabulary] behind the prompt name, which need not be read again."""
        self.times.first_scheduled_ns = self.times.arrival_ns
        self.times.first_token_ns = self.times.last_token_ns = time.monotonic_ns()
        token = int(logits.argmax())
        if token in self.request.end_ids:
            return Chunk(finish=END_ID)
        self.token_ids.append(token)
        return Chunk((token,), (float(log_softmax(logits)[token]),), self.finish_after_token())


def _to_nobody(chunk: Chunk) -> None:
    """Who takes the chunks after the last one.

    A receiver that knows its generation would be kept alive by it until Python's garbage collector comes; with it, in
    Triton, a response sender, and one that is left to the end of the process crashes there.
    """
