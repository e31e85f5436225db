"""Stop strings found in text that arrives in pieces, wherever the borders between the pieces lie."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, which itself is left out.

    Text that might be the beginning of a stop string is held back until that is decided. ``found`` tells that the end
    was reached; nothing comes out after it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain after ``text`` arrived."""
        if self.found:
            return ""
        self._held += text
        ends = [place for place in map(self._held.find, self._words) if place >= 0]
        if ends:
            self.found = True
            certain, self._held = self._held[: min(ends)], ""
            return certain
        keep = max((self._overlap(word) for word in self._words), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """What was held back, when no text follows any more."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, word: str) -> int:
        """How many characters at the end of the held text begin ``word``."""
        longest = min(len(word) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(word[:n])), 0)
