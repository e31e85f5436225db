"""A text request turned into the tensors that tensorrt_llm takes, with every length checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.text.errors import RequestError
from minitron.text.tensors import MESSAGE_BYTES, Arrays
from minitron.text.tokenizer import TextTokenizer

Ints = NDArray[np.int32]
Texts = NDArray[np.object_]

#: Bytes of a logit, by what the text model's parameter ``context_logits`` says.
_LOGIT_BYTES = {"FP32": 4, "FP16": 2}


@dataclass(frozen=True)
class Prompt:
    """Inputs of tensorrt_llm for a batch of B texts, and the ids of each text by themselves.

    ``input_ids`` int32 [B, longest], right-padded; ``input_lengths``, ``request_output_len``, ``end_id``, ``pad_id``
    int32 [B, 1]; ``stop_words_list``, ``bad_words_list`` int32 [B, 2, n], n = 0 for none; ``embedding_bias`` float32
    [B, vocabulary], or [B, 0] for none. An engine knows one end id; ``more_end_ids`` are the model's others, which are
    stop words of one token each.
    """

    rows: list[list[int]]
    more_end_ids: tuple[int, ...]
    input_ids: Ints
    input_lengths: Ints
    request_output_len: Ints
    end_id: Ints
    pad_id: Ints
    stop_words_list: Ints
    bad_words_list: Ints
    embedding_bias: NDArray[np.float32]
    vocab_size: int


class PromptMaker:
    """Makes prompts by the limits in a model's ``parameters`` (strings, as Triton hands them out)."""

    def __init__(self, tokenizer: TextTokenizer, parameters: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._max_input_len = int(parameters["max_input_len"])
        self._max_seq_len = int(parameters["max_seq_len"])
        self._vocab_size = int(parameters["vocab_size"])
        self._context_logits = parameters.get("context_logits", "none")
        self._max_logits_bytes = int(parameters.get("max_logits_bytes", 0))

    def of_request(self, arrays: Arrays) -> Prompt:
        """The prompts of a request by the names of the text model's inputs; raises RequestError."""
        return self.make(
            arrays["text_input"],
            arrays["max_tokens"],
            stop_words=arrays.get("stop_words"),
            bad_words=arrays.get("bad_words"),
            bias_words=arrays.get("embedding_bias_words"),
            bias_weights=arrays.get("embedding_bias_weights"),
            end_id=arrays.get("end_id"),
            pad_id=arrays.get("pad_id"),
        )

    def make(
        self,
        texts: Texts,
        max_tokens: Ints,
        *,
        stop_words: Texts | None = None,
        bad_words: Texts | None = None,
        bias_words: Texts | None = None,
        bias_weights: NDArray[np.float32] | None = None,
        end_id: Ints | None = None,
        pad_id: Ints | None = None,
    ) -> Prompt:
        """Tokenize ``texts`` [B, 1] (or [B]) for up to ``max_tokens`` [B, 1] new tokens each; raises RequestError."""
        rows = [self._tokenizer.encode(text) for text in strings(texts, "the prompt")]
        return self.of_ids(
            rows, max_tokens, stop_words=stop_words, bad_words=bad_words, end_id=end_id, pad_id=pad_id,
            bias=self._bias(bias_words, bias_weights, len(rows)),
        )  # fmt: skip

    def of_ids(
        self,
        rows: list[list[int]],
        max_tokens: Ints,
        *,
        stop_words: Texts | None = None,
        bad_words: Texts | None = None,
        bias: NDArray[np.float32] | None = None,
        end_id: Ints | None = None,
        pad_id: Ints | None = None,
    ) -> Prompt:
        """The same for prompts that are ids already; ``bias`` [B, vocabulary] or [B, 0]. Raises RequestError."""
        outputs = [int(count) for count in max_tokens.reshape(-1)]
        if len(outputs) != len(rows):
            raise RequestError(f"{len(rows)} prompts and {len(outputs)} output lengths: one for each is needed")
        for row, output in zip(rows, outputs, strict=True):
            self._check_lengths(len(row), output)
        ends, batch = self._tokenizer.end_ids, len(rows)
        end = _column(end_id, (ends or (-1,))[0], batch)
        pad = _column(pad_id, self._tokenizer.pad_id, batch)
        more_ends = ends[1:] if end_id is None else ()
        return Prompt(
            rows, more_ends, _padded(rows, pad), np.array([[len(row)] for row in rows], np.int32),
            np.array(outputs, np.int32).reshape(-1, 1), end, pad,
            self._word_lists(stop_words, batch, "stop_words", [[token] for token in more_ends]),
            self._word_lists(bad_words, batch, "bad_words"),
            np.zeros((batch, 0), np.float32) if bias is None else bias,
            self._vocab_size,
        )  # fmt: skip

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        """Refuse ids that the vocabulary has not; raises RequestError."""
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"{what} has the token id {token}, and ids go from 0 to {self._vocab_size - 1}")

    def check_context_logits(self, prompt: int) -> None:
        """Whether the engine gives the logits of a prompt of so many tokens; raises RequestError that says which does.

        A response is one message of protobuf, and so less than 2 GiB.
        """
        if self._context_logits not in _LOGIT_BYTES:
            raise RequestError(
                "this engine gives no log probs of the prompt: TensorRT-LLM needs one that is built with "
                "gather_context_logits (trtllm_build: {gather_context_logits: true} in a recipe) and served without "
                "enable_kv_cache_reuse; a CPU engine gives them, in a repository that is rendered again"
            )
        most = MESSAGE_BYTES // (_LOGIT_BYTES[self._context_logits] * self._vocab_size)
        if prompt > most:
            raise RequestError(
                f"the prompt has {prompt} tokens, and a response of the engine holds the logits of at most {most}"
            )

    def check_logits(self, tokens: int) -> None:
        """Refuse a request for the logits of so many tokens that it takes too much; raises RequestError."""
        wanted = tokens * self._vocab_size * _LOGIT_BYTES["FP32"]
        if wanted > self._max_logits_bytes:
            raise RequestError(
                f"the logits of {tokens} tokens take {wanted:,} bytes, and a request may ask for "
                f"{self._max_logits_bytes:,} (serving.max_logits_bytes)"
            )

    def bias_of_ids(self, weights: Mapping[int, float]) -> NDArray[np.float32]:
        """``embedding_bias`` [1, vocabulary] of one prompt; raises RequestError for ids that are not there."""
        self.check_ids(list(weights), "the bias")
        bias = np.zeros((1, self._vocab_size), np.float32)
        for token, weight in weights.items():
            bias[0, token] = weight
        return bias

    def room_for(self, prompt: int) -> int:
        """How many new tokens fit behind a prompt of so many."""
        return self._max_seq_len - prompt

    def _check_lengths(self, prompt: int, output: int) -> None:
        if prompt < 1:
            raise RequestError("the prompt is empty")
        if prompt > self._max_input_len:
            raise RequestError(
                f"the prompt has {prompt} tokens, and the engine takes at most {self._max_input_len} (max_input_len)"
            )
        if output < 1:
            raise RequestError(f"an output of {output} tokens was asked for, and at least 1 is needed")
        if prompt + output > self._max_seq_len:
            raise RequestError(
                f"the prompt's {prompt} tokens and {output} new ones are more than the {self._max_seq_len} that the "
                f"engine takes together (max_seq_len); at most {self._max_seq_len - prompt} new ones fit"
            )

    def _word_lists(self, words: Texts | None, batch: int, what: str, more: Sequence[list[int]] = ()) -> Ints:
        """Every row's words in ids: row 0 the ids of all words, row 1 where each ends, then -1 (TensorRT-LLM's way)."""
        per_row = [[] for _ in range(batch)] if words is None else string_rows(words, batch, what)
        spelled = [[*(ids for word in row for ids in self._tokenizer.encode_word(word)), *more] for row in per_row]
        flat = [([t for ids in row for t in ids], np.cumsum([len(ids) for ids in row])) for row in spelled]
        longest = max(len(ids) for ids, _ in flat)
        lists = np.zeros((batch, 2, longest), np.int32)
        lists[:, 1] = -1
        for row, (ids, ends) in enumerate(flat):
            lists[row, 0, : len(ids)] = ids
            lists[row, 1, : len(ends)] = ends
        return lists

    def _bias(self, words: Texts | None, weights: NDArray[np.float32] | None, batch: int) -> NDArray[np.float32]:
        if words is None and weights is None:
            return np.zeros((batch, 0), np.float32)
        if words is None or weights is None or words.size != weights.size:
            raise RequestError("embedding_bias_words and embedding_bias_weights need the same number of entries")
        bias = np.zeros((batch, self._vocab_size), np.float32)
        texts = strings(words, "embedding_bias_words")
        for place, (text, weight) in enumerate(zip(texts, weights.reshape(-1), strict=True)):
            for ids in self._tokenizer.encode_word(text)[:1]:
                bias[place * batch // len(texts), ids] += weight
        return bias


def strings(array: Texts, what: str) -> list[str]:
    """The texts of a STRING tensor; raises RequestError for bytes that are not UTF-8."""
    try:
        return [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not valid UTF-8 (at byte {error.start})") from None


def string_rows(array: Texts, batch: int, what: str) -> list[list[str]]:
    """The texts of a STRING tensor [batch, n], row by row, empty ones left out; raises RequestError."""
    if array.size % batch:
        raise RequestError(f"{what} has {array.size} entries for {batch} prompts: every prompt needs as many")
    rows: list[Any] = np.array_split(np.array(strings(array, what), dtype=object), batch)
    return [[text for text in row if text] for row in rows]


def _column(given: Ints | None, default: int, batch: int) -> Ints:
    if given is None:
        return np.full((batch, 1), default, np.int32)
    if given.size != batch:
        raise RequestError(f"{given.size} values for {batch} prompts: one for each is needed")
    return given.reshape(batch, 1).astype(np.int32)


def _padded(rows: list[list[int]], pad: Ints) -> Ints:
    ids = np.repeat(pad, max(map(len, rows)), axis=1)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return ids
