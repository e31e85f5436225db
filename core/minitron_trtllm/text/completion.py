"""One prompt in ids, one sequence of text: what the gateway and other callers outside Triton ask for.

The text model speaks in tensors, of batches and beams (``service``, ``answers``); here a request is a ``Sampling`` and
an answer a row of ``Piece``. Prompt, ends, stop strings and detokenizing are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minitron_trtllm.text.detokenizer import Decoder
from minitron_trtllm.text.engine import EngineError
from minitron_trtllm.text.prompts import Prompt, PromptMaker
from minitron_trtllm.text.request import TextRequest
from minitron_trtllm.text.sequence import SequenceText, without_end
from minitron_trtllm.text.tensors import Arrays, Tensors

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Sampling:
    """How to go on from a prompt.

    ``temperature`` 0 takes the likeliest token each time; ``top_k`` 0 and ``top_p`` 1 cut nothing. ``bias`` is added
    to the logits of these ids. ``ignore_end``: no token ends the sequence. ``streams``: the text as it comes.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_words: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    ignore_end: bool = False
    log_probs: bool = False
    streams: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def request(self) -> TextRequest:
        """By the names of the text model's inputs; only what differs from the engine's own default is sent."""
        numbers: dict[str, tuple[float, Any]] = {}
        if self.is_greedy:
            # Not temperature 0: the engine divides by it where it computes log probs.
            numbers["top_k"] = (1, np.int32)
        else:
            numbers |= {"top_p": (self.top_p, np.float32), "seed": (self.seed, np.uint64)}
            if self.temperature != 1:
                numbers["temperature"] = (self.temperature, np.float32)
            if self.top_k:
                numbers["top_k"] = (self.top_k, np.int32)
        if self.min_tokens:
            numbers["min_tokens"] = (self.min_tokens, np.int32)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                numbers[name] = (value, np.float32)
        arrays: Tensors = {name: np.array([[value]], kind) for name, (value, kind) in numbers.items()}
        if self.log_probs:
            arrays["return_log_probs"] = np.array([[True]])
        return TextRequest(arrays, 1, self.streams, echoes=False, sequences=1, stop_words=[list(self.stop_words)])

    def prompt(self, maker: PromptMaker, ids: list[int]) -> Prompt:
        """The prompt's tensors; raises RequestError where it does not fit."""
        stop_words = np.array([[word.encode() for word in self.stop_words]], dtype=object) if self.stop_words else None
        return maker.of_ids(
            [ids],
            np.array([[self.max_tokens]], np.int32),
            stop_words=stop_words,
            end_id=np.array([[-1]], np.int32) if self.ignore_end else None,
            bias=maker.bias_of_ids(self.bias) if self.bias else None,
        )


@dataclass(frozen=True)
class Token:
    """A generated token: what it added to the text, where that begins (characters of the answer), its log prob."""

    id: int
    text: str
    offset: int
    log_prob: float


@dataclass(frozen=True)
class Piece:
    """The text that became certain, how many tokens came, and ``finish`` (STOP, LENGTH) on the last one.

    ``log_probs``: where asked for, of the tokens whose text is out; those of a stop string are left out.
    """

    text: str
    tokens: int
    finish: str | None = None
    log_probs: tuple[Token, ...] = ()

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """Several in a row, at least one, as one."""
        return cls(
            "".join(piece.text for piece in pieces),
            sum(piece.tokens for piece in pieces),
            pieces[-1].finish,
            tuple(token for piece in pieces for token in piece.log_probs),
        )


class Completion:
    """Pieces from the responses of tensorrt_llm to one prompt and one sequence."""

    def __init__(self, decoder: Decoder, prompt: Prompt, sampling: Sampling) -> None:
        self._text = SequenceText(decoder, prompt.rows[0], sampling.stop_words)
        self._sampling, self._ends = sampling, prompt.more_end_ids
        self._tokens = self._raw = self._given = 0  # ids that came; characters that they made, and that are out
        self._ended = False
        self._held: list[Token] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, so that the engine works for nothing."""
        return self._text.stopped

    def feed(self, responses: Sequence[Arrays]) -> Piece:
        """What some responses gave; raises EngineError for ones that cannot be."""
        ids: list[int] = []
        log_probs: list[float] = []
        for response in responses:
            if "output_ids" not in response:
                continue
            new, probs = self._read(response)
            ids += new
            log_probs += probs
        text, count = self._feed(ids, log_probs)
        self._tokens += count
        self._given += len(text)
        return Piece(text, count, log_probs=self._released())

    def finish(self) -> Piece:
        """The last piece."""
        rest, text = self._text.finish_one()
        self._given += len(text)
        if rest and self._held:
            self._held[-1] = replace(self._held[-1], text=self._held[-1].text + rest)
        held = tuple(token for token in self._held if not self.stopped or token.offset < self._given)
        reached = self._tokens >= self._sampling.max_tokens and not (self.stopped or self._ended)
        return Piece(text, 0, LENGTH if reached else STOP, held)

    def _read(self, response: Arrays) -> tuple[list[int], list[float]]:
        """New ids and their log probs."""
        if self._ends:
            shorter = without_end(response, self._ends)
            self._ended = self._ended or shorter is not response
            response = shorter
        length = int(response["sequence_length"].reshape(-1)[0])
        ids = response["output_ids"].reshape(-1)[:length].tolist()
        if not self._sampling.log_probs:
            return ids, []
        log_probs = response["output_log_probs"].reshape(-1).tolist() if "output_log_probs" in response else []
        if len(log_probs) != len(ids):
            raise EngineError(f"the engine gave {len(log_probs)} log probs for {len(ids)} tokens")
        return ids, log_probs

    def _feed(self, ids: list[int], log_probs: list[float]) -> tuple[str, int]:
        """The text that became certain, and how many ids it took: none behind a stop string counts."""
        if not (self._sampling.stop_words or log_probs):
            return self._text.feed(ids), len(ids)
        text = ""
        for count, token in enumerate(ids, 1):
            piece, certain = self._text.feed_one(token)
            text += certain
            if log_probs:
                self._held.append(Token(token, piece, self._raw, log_probs[count - 1]))
                self._raw += len(piece)
            if self.stopped:
                return text, count
        return text, len(ids)

    def _released(self) -> tuple[Token, ...]:
        """The tokens whose text is out; one without text waits for what follows."""
        count = 0
        for place, token in enumerate(self._held):
            if token.text and token.offset + len(token.text) <= self._given:
                count = place + 1
        released, self._held = tuple(self._held[:count]), self._held[count:]
        return released
