"""What is answered: OpenAI's objects of a whole answer and of a stream's events.

Offsets of log probs count characters of the answer's own text (with ``echo``, of prompt and answer together).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from minitron.text.completion import Piece
from minitron.text.log_probs import Token

DONE = b"data: [DONE]\n\n"


def event(document: bytes, name: str = "") -> bytes:
    """A server-sent event."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + document + b"\n\n"


class Answer:
    """The answer to one request: its id, and the objects that carry it. This one is ``/v1/completions``'s."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, includes_usage: bool, alternatives: int) -> None:
        """``alternatives``: how many of the likeliest tokens go with each token's own log prob, 0 or 1."""
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        start = json.dumps({**self._head, "object": self.part_object})
        self._start = b"data: " + start[:-1].encode() + b', "choices": ['
        self._end = b'], "usage": null}\n\n' if includes_usage else b"]}\n\n"
        self._alternatives = alternatives

    def part(self, index: int, piece: Piece, usage: Mapping[str, int] | None = None) -> bytes:
        """The event of what came of one choice, with the counts until then where they are wanted."""
        end = self._end if usage is None else b'], "usage": ' + json.dumps(usage).encode() + b"}\n\n"
        return self._start + json.dumps(self._part(index, piece)).encode() + end

    def usage_part(self, usage: Mapping[str, int]) -> bytes:
        """The last event, with the counts."""
        document = {**self._head, "object": self.part_object, "choices": [], "usage": usage}
        return event(json.dumps(document).encode())

    def whole(self, choices: Sequence[Piece], usage: Mapping[str, int]) -> bytes:
        """The whole answer."""
        made = [self._choice(index, piece) for index, piece in enumerate(choices)]
        return json.dumps({**self._head, "object": self.whole_object, "choices": made, "usage": usage}).encode()

    def _part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        log_probs = self._log_probs((*piece.prompt, *piece.log_probs))
        return {"index": index, "text": piece.text, "logprobs": log_probs, "finish_reason": piece.finish}

    def _log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        top = [_likeliest(token) for token in tokens] if self._alternatives else None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": top,
            "text_offset": [token.offset for token in tokens],
        }


def _likeliest(token: Token) -> dict[str, float] | None:
    """The likeliest texts in a token's place; of a generated one its own, of a prompt's first nothing."""
    return {token.text: token.log_prob} if token.likeliest is None and token.log_prob is not None else token.likeliest


class ChatAnswer(Answer):
    """``/v1/chat/completions``'s."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, *, includes_usage: bool, alternatives: int) -> None:
        super().__init__(model, includes_usage=includes_usage, alternatives=alternatives)
        self._begun: set[int] = set()

    def _part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if piece.text or not piece.finish:
            delta["content"] = piece.text
        log_probs = self._log_probs(piece.log_probs)
        return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": piece.finish}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        log_probs = self._log_probs(piece.log_probs)
        return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": piece.finish}

    def _log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        own = {"token": token.text, "logprob": token.log_prob, "bytes": list(token.text.encode())}
        return own | {"top_logprobs": [own] if self._alternatives else []}
