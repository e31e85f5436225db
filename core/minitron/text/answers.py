"""From the responses of tensorrt_llm to those of the text model: ids become text, everything else is passed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minitron.text.detokenizer import Decoder
from minitron.text.prompts import Prompt
from minitron.text.request import TextRequest
from minitron.text.sequence import SequenceText, without_end
from minitron.text.tensors import Arrays, Tensors

_TOKENS = ("output_ids", "sequence_length")
_PLACE = ("batch_index", "sequence_index")
#: What responses may have to become one; of logits each is sent as it came.
_JOINABLE = frozenset({*_TOKENS, *_PLACE, "output_log_probs", "cum_log_probs", "num_output_tokens"})


class _Sequence:
    """One generated sequence (with its beams): text so far, and the tensors beside it."""

    def __init__(self, decoder: Decoder, context: list[int], stop_words: list[str], beams: int) -> None:
        self._beams = [SequenceText(decoder, context, stop_words) for _ in range(beams)]
        self.texts = [""] * beams
        self.beside: Tensors = {}

    @property
    def stopped(self) -> bool:
        """Whether every beam has met a stop string."""
        return all(beam.stopped for beam in self._beams)

    def feed(self, outputs: Arrays) -> list[str]:
        """The new text of each beam."""
        lengths = outputs["sequence_length"].reshape(-1)
        rows = outputs["output_ids"].reshape(len(lengths), -1)
        return [beam.feed(row[:length].tolist()) for beam, row, length in zip(self._beams, rows, lengths, strict=True)]

    def finish(self) -> list[str]:
        """What was held back of each beam."""
        return [beam.finish() for beam in self._beams]


class TextResponses:
    """The responses to one request. ``feed`` takes what the engine sent, ``finish`` what remains at its end."""

    def __init__(self, decoder: Decoder, prompt: Prompt, request: TextRequest) -> None:
        self._decoder, self._prompt, self._request = decoder, prompt, request
        self._sequences: dict[tuple[int, int], _Sequence] = {}

    @property
    def all_stopped(self) -> bool:
        """Whether every sequence of the request has met a stop string, so that the engine works for nothing."""
        expected = self._request.batch * self._request.sequences
        return len(self._sequences) == expected and all(s.stopped for s in self._sequences.values())

    def feed_all(self, batch: Sequence[Arrays]) -> Iterator[Tensors]:
        """The responses to send for those of the engine that were there together.

        Tokens that had to wait go out as one response for each sequence, not one for each token: what costs most is
        a response, and who is behind catches up so. With stop strings each token stays by itself, since what belongs to
        those behind a stop string is not sent.
        """
        for outputs in batch if any(self._request.stop_words) else _together(batch):
            response = self.feed(outputs)
            if response is not None:
                yield response

    def feed(self, outputs: Arrays) -> Tensors | None:
        """The response to send for one of the engine, or None when there is nothing to send yet."""
        if "output_ids" not in outputs:
            return None
        row, number = _place(outputs)
        beams = outputs["sequence_length"].size
        sequence = self._sequences.get((row, number))
        if sequence is None:
            sequence = _Sequence(self._decoder, self._prompt.rows[row], self._request.stop_words[row], beams)
            self._sequences[row, number] = sequence
        if sequence.stopped:
            return None
        if self._prompt.more_end_ids:
            outputs = without_end(outputs, self._prompt.more_end_ids)
        texts = sequence.feed(outputs)
        beside = {name: value for name, value in outputs.items() if name not in _TOKENS}
        if self._request.streams:
            sequence.beside = {name: beside[name] for name in _PLACE if name in beside}
            if "num_output_tokens" in beside:  # what is held back to the end are no new tokens
                sequence.beside["num_output_tokens"] = np.zeros_like(beside["num_output_tokens"])
            return _text_output(texts) | beside
        sequence.texts = [old + new for old, new in zip(sequence.texts, texts, strict=True)]
        sequence.beside = _joined(sequence.beside, beside)
        return None

    def finish(self) -> Iterator[Tensors]:
        """The whole answers, or of a stream the text that was held back."""
        for (row, _), sequence in sorted(self._sequences.items()):
            lead = self._decoder.decode(self._prompt.rows[row]) if self._request.echoes else ""
            rests = sequence.finish()
            texts = [lead + text + rest for text, rest in zip(sequence.texts, rests, strict=True)]
            if any(rests) or not self._request.streams:
                yield _text_output(texts) | sequence.beside


def _place(outputs: Arrays) -> tuple[int, int]:
    """The prompt of the batch and the sequence of it that a response is about."""
    row, number = (int(outputs[name].reshape(-1)[0]) if name in outputs else 0 for name in _PLACE)
    return row, number


def _together(batch: Sequence[Arrays]) -> Iterator[Arrays]:
    """The same tokens in fewer responses; of each sequence in the order in which they came."""
    if len(batch) == 1:
        yield batch[0]
        return
    joined: dict[tuple[int, int], Tensors] = {}
    for outputs in batch:
        if outputs.keys() <= _JOINABLE and "output_ids" in outputs and outputs["sequence_length"].size == 1:
            place = _place(outputs)
            new = dict(outputs) | {"output_ids": outputs["output_ids"][..., : int(outputs["sequence_length"].item())]}
            joined[place] = _joined(joined[place], new) if place in joined else new
        else:
            yield from joined.values()
            joined.clear()
            yield outputs
    yield from joined.values()


def _text_output(texts: list[str]) -> Tensors:
    """``text_output`` is [beams], rank 1 as upstream's."""
    return {"text_output": np.array([text.encode() for text in texts], dtype=object)}


#: Tensors of which one follows on the other, and those that are counts. Of all others the latest holds.
_IN_A_ROW, _SUMMED = ("output_ids", "output_log_probs"), ("sequence_length", "num_output_tokens")


def _joined(old: Tensors, new: Tensors) -> Tensors:
    """Tensors of a whole from those of its parts."""
    joined = old | new
    for name in old.keys() & new.keys():
        if name in _IN_A_ROW:
            joined[name] = np.concatenate([old[name], new[name]], axis=-1)
        elif name in _SUMMED:
            joined[name] = old[name] + new[name]
    return joined
