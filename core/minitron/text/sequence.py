"""The text of one generated sequence while its ids come: detokenized, and ended at the first stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from minitron.text.detokenizer import Decoder, Detokenizer
from minitron.text.stop_strings import StopStrings
from minitron.text.tensors import Arrays


class SequenceText:
    """``context`` are the ids before the sequence (its prompt), ``stop_words`` the texts that end it."""

    def __init__(self, decoder: Decoder, context: Sequence[int], stop_words: Sequence[str]) -> None:
        self._detokenizer, self._stops = Detokenizer(decoder, context), StopStrings(stop_words)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.found

    def feed(self, ids: Sequence[int]) -> str:
        """The text that became certain with ``ids``."""
        return self._stops.feed(self._detokenizer.feed(ids))

    def feed_one(self, token: int) -> tuple[str, str]:
        """What one id adds to the text (nothing inside a character), and the text that became certain with it."""
        piece = self._detokenizer.feed([token])
        return piece, self._stops.feed(piece)

    def finish(self) -> str:
        """What was held back, when no id follows any more."""
        return self.finish_one()[1]

    def finish_one(self) -> tuple[str, str]:
        """The same, and before it what the last id still adds to the text."""
        rest = self._detokenizer.finish()
        return rest, self._stops.feed(rest) + self._stops.finish()


def without_end(outputs: Arrays, ends: Collection[int]) -> Arrays:
    """A response without the end token that closes it.

    TensorRT-LLM leaves out the one end token that a request names. The model's other ones are stop words to it, which
    it counts among the output.
    """
    lengths = outputs["sequence_length"]
    length = int(lengths.reshape(-1)[0])
    if lengths.size != 1 or length == 0 or int(outputs["output_ids"].reshape(-1)[length - 1]) not in ends:
        return outputs
    shorter = dict(outputs) | {"sequence_length": lengths - 1}
    if "output_log_probs" in outputs:
        shorter["output_log_probs"] = outputs["output_log_probs"][..., : length - 1]
    if "num_output_tokens" in outputs:
        shorter["num_output_tokens"] = outputs["num_output_tokens"] - 1
    return shorter
