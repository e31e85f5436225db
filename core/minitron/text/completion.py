"""One prompt in ids, one sequence of text: what the gateway and other callers outside Triton ask for.

The text model speaks in tensors, of batches and beams (``service``, ``answers``); here a request is a ``Sampling`` and
an answer a row of ``Piece``. Prompt, ends, stop strings and detokenizing are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minitron.text import log_probs
from minitron.text.detokenizer import Decoder
from minitron.text.engine import EngineCallError
from minitron.text.log_probs import Token
from minitron.text.prompts import Prompt, PromptMaker
from minitron.text.request import TextRequest
from minitron.text.sequence import SequenceText, without_end
from minitron.text.tensors import Arrays, Tensors

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Sampling:
    """How to go on from a prompt.

    ``temperature`` 0 takes the likeliest token each time; ``top_k`` 0 and ``top_p`` 1 cut nothing. ``bias`` is added
    to the logits of these ids. ``ignore_end``: no token ends the sequence. ``streams``: the text as it comes.
    ``echo``: the prompt's text comes first. ``prompt_log_probs``: so do the log probs of its tokens, each with so many
    of the likeliest ones; the answer then comes whole. ``max_tokens`` 0: the prompt alone is of interest.
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
    echo: bool = False
    prompt_log_probs: int | None = None

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
        stop_words, streams = list(self.stop_words), self.streams
        if self.prompt_log_probs is not None:
            arrays["return_context_logits"] = np.array([[True]])
            # TensorRT-LLM sends the logits of the prompt with every response (LlmRequest::createResult): let it be one.
            stop_words, streams = [], False
        return TextRequest(arrays, 1, streams, echoes=False, sequences=1, stop_words=[stop_words])

    def prompt(self, maker: PromptMaker, ids: list[int]) -> Prompt:
        """The prompt's tensors; raises RequestError where it does not fit.

        An engine makes one token at least. Where log probs of the prompt are asked for and one is all that it may make,
        that is no end token's place: clients count on a log prob for it.
        """
        if self.prompt_log_probs is not None:
            maker.check_context_logits(len(ids))
        goes_on = self.ignore_end or (self.prompt_log_probs is not None and self.max_tokens < 2)
        stop_words = np.array([[word.encode() for word in self.stop_words]], dtype=object) if self.stop_words else None
        return maker.of_ids(
            [ids],
            np.array([[max(self.max_tokens, 1)]], np.int32),
            stop_words=stop_words,
            end_id=np.array([[-1]], np.int32) if goes_on else None,
            bias=maker.bias_of_ids(self.bias) if self.bias else None,
        )


@dataclass(frozen=True)
class Piece:
    """The text that became certain, how many tokens came, and ``finish`` (STOP, LENGTH) on the last one.

    ``log_probs``: where asked for, of the tokens whose text is out; those of a stop string are left out. ``prompt``:
    the prompt's, in the first piece.
    """

    text: str
    tokens: int
    finish: str | None = None
    log_probs: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """Several in a row, at least one, as one."""
        return cls(
            "".join(piece.text for piece in pieces),
            sum(piece.tokens for piece in pieces),
            pieces[-1].finish,
            tuple(token for piece in pieces for token in piece.log_probs),
            tuple(token for piece in pieces for token in piece.prompt),
        )


class Completion:
    """Pieces from the responses of tensorrt_llm to one prompt and one sequence."""

    def __init__(self, decoder: Decoder, prompt: Prompt, sampling: Sampling) -> None:
        self._decoder, self._prompt = decoder, prompt
        self._text = SequenceText(decoder, prompt.rows[0], sampling.stop_words)
        self._sampling, self._ends = sampling, prompt.more_end_ids
        self._lead = decoder.decode(prompt.rows[0]) if sampling.echo else ""
        self._tokens = 0  # ids that came
        self._raw = self._given = len(self._lead)  # characters that are there, and that are out
        self._ended = False
        self._held: list[Token] = []
        self._context: tuple[Token, ...] = ()
        self.wants_context = sampling.prompt_log_probs is not None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, so that the engine works for nothing."""
        return self._text.stopped

    def read_context(self, responses: Sequence[Arrays]) -> None:
        """Take the prompt's log probs, while ``wants_context``, from the logits that a response has: half a second's
        work for 500 tokens of a vocabulary of 256,000. Raises EngineCallError for logits that cannot be the prompt's.
        """
        ids, size = self._prompt.rows[0], self._prompt.vocab_size
        for logits in (one["context_logits"] for one in responses if "context_logits" in one):
            if logits.ndim != 3 or logits.shape[1] != len(ids) or logits.shape[2] < size:
                raise EngineCallError(
                    f"the engine gave logits of shape {list(logits.shape)} for {len(ids)} tokens of the prompt and a "
                    f"vocabulary of {size}"
                )
            # TensorRT-LLM pads the vocabulary where the GPUs cannot share it evenly.
            self._context = log_probs.of_prompt(
                self._decoder, ids, logits[0, :, :size], self._sampling.prompt_log_probs or 0
            )
            self.wants_context = False
            return

    def feed(self, responses: Sequence[Arrays]) -> Piece:
        """What some responses gave; raises EngineCallError for ones that cannot be."""
        ids: list[int] = []
        values: list[float] = []
        for response in responses:
            if "output_ids" not in response:
                continue
            new, of_new = self._read(response)
            ids += new
            values += of_new
        text, count = self._feed(ids, values)
        self._tokens += count
        self._given += len(text)
        return self._first(Piece(text, count, log_probs=self._released()))

    def finish(self) -> Piece:
        """The last piece. Raises EngineCallError where the prompt's logits did not come."""
        if self.wants_context:
            raise EngineCallError("the engine gave no logits of the prompt")
        rest, text = self._text.finish_one()
        self._given += len(text)
        if rest and self._held:
            self._held[-1] = replace(self._held[-1], text=self._held[-1].text + rest)
        held = tuple(token for token in self._held if not self.stopped or token.offset < self._given)
        reached = self._tokens >= self._sampling.max_tokens and not (self.stopped or self._ended)
        return self._first(Piece(text, 0, LENGTH if reached else STOP, held))

    def _first(self, piece: Piece) -> Piece:
        """The piece, with what comes before the answer where it is the first."""
        lead, context = self._lead, self._context
        self._lead, self._context = "", ()
        return replace(piece, text=lead + piece.text, prompt=context) if lead or context else piece

    def _read(self, response: Arrays) -> tuple[list[int], list[float]]:
        """New ids and their log probs."""
        if not self._sampling.max_tokens:
            return [], []
        if self._ends:
            shorter = without_end(response, self._ends)
            self._ended = self._ended or shorter is not response
            response = shorter
        length = int(response["sequence_length"].reshape(-1)[0])
        ids = response["output_ids"].reshape(-1)[:length].tolist()
        if not self._sampling.log_probs:
            return ids, []
        values = response["output_log_probs"].reshape(-1).tolist() if "output_log_probs" in response else []
        if len(values) != len(ids):
            raise EngineCallError(f"the engine gave {len(values)} log probs for {len(ids)} tokens")
        return ids, values

    def _feed(self, ids: list[int], values: list[float]) -> tuple[str, int]:
        """The text that became certain, and how many ids it took: none behind a stop string counts."""
        if not (self._sampling.stop_words or values):
            return self._text.feed(ids), len(ids)
        text = ""
        for count, token in enumerate(ids, 1):
            piece, certain = self._text.feed_one(token)
            text += certain
            if values:
                self._held.append(Token(token, piece, self._raw, values[count - 1]))
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
