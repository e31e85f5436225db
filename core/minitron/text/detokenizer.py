"""Ids to text while they arrive.

The law: the text of the context and all chunks joined are the text of all ids decoded at once. Decoding each id by
itself breaks it twice: SentencePiece drops the space before the first id of whatever it decodes, and a character may
be spread over several ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to


class Decoder(Protocol):
    """What the detokenizer asks of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""

    def is_skipped(self, token: int) -> bool:
        """Whether ``decode`` leaves this id out."""

    def is_byte(self, token: int) -> bool:
        """Whether this id is one byte of a run that is decoded as a whole."""


class Detokenizer:
    """The text of one sequence; ``context`` are the ids before it (its prompt), whose text is not given out."""

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._ids = list(context)
        # The text of ids[:_given] is out. Decoding starts at ids[_start], one piece of text earlier, so that what
        # follows is not taken for the beginning of a text.
        self._start, self._given = 0, len(self._ids)
        self._in_bytes = False

    def feed(self, ids: Sequence[int]) -> str:
        """The text that became certain with ``ids``; empty while a character is incomplete."""
        for token in ids:
            if not self._decoder.is_skipped(token):
                self._in_bytes = self._decoder.is_byte(token)
        self._ids += ids
        # A run of byte ids is valid or not as a whole: one more byte can turn the characters before it into U+FFFD.
        return "" if self._in_bytes else self._take(complete_only=True)

    def finish(self) -> str:
        """The rest, when no id follows any more."""
        return self._take(complete_only=False)

    def _take(self, *, complete_only: bool) -> str:
        before = self._decoder.decode(self._ids[self._start : self._given])
        text = self._decoder.decode(self._ids[self._start :])
        if len(text) <= len(before) or (complete_only and text.endswith(_REPLACEMENT)):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text[len(before) :]
