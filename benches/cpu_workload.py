"""What ``bench_cpu`` asks of each side in a round, and what that takes of the engine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_figures
from circling_model import LENGTH, Rings
from cpu_sides import Side
from tokenizers import Tokenizer

from minitron.model.runtime_limits import TOKENS_PER_BLOCK

#: Fillers of prompts; the circling model copies none of them.
WORDS = ("river", "stone", "light", "house", "morning", "water", "garden", "winter", "letter", "road", "voice", "table")
ALL_FILLERS = f"0 1 2 3 4 5 6 7 8 9 a r . {' '.join(WORDS)}"
_REPEATED_TOKENS = LENGTH + 32


@dataclass(frozen=True)
class Workload:
    """One prompt alone for its first token, then so many streams at once, then one of text that repeats itself."""

    model: Path
    circles: bool  # whether it is a circling model
    prompt_tokens: int
    stream_prompt_tokens: int
    output_tokens: int
    streams: tuple[int, ...]
    repeating: bool

    def measure(self, side: Side, number: int) -> dict[str, float]:
        """The figures of one side in a round, by their names."""
        figures: dict[str, float] = {}
        for figure, prompts, tokens in self._asked(number):
            done = side.ask(prompts, tokens)
            assert done["tokens"] == len(prompts) * tokens, f"{side.name}, {figure}: {done}"
            figures[figure] = done["ttft_s"] if tokens == 1 else done["tokens"] / done["seconds"]
        return figures | {cpu_figures.PEAK_PRIVATE: side.memory.private}

    def warm(self, side: Side, number: int) -> None:
        """The first request of a side that was just loaded; no figure is of it."""
        side.ask(self._prompts(f"{number} w", 1, self.stream_prompt_tokens), 2)

    def _asked(self, number: int) -> Iterator[tuple[str, list[str], int]]:
        """Figure, prompts, and tokens for each."""
        yield f"ttft_{self.prompt_tokens}", self._prompts(f"{number} a", 1, self.prompt_tokens), 1
        for count in self.streams:
            prompts = self._prompts(f"{number} {count}", count, self.stream_prompt_tokens)
            yield cpu_figures.streams_figure(count), prompts, self.output_tokens
        if self.repeating:
            yield cpu_figures.REPEATING, [self._repeating_prompt(number)], self.output_tokens

    def _prompts(self, mark: str, count: int, tokens: int) -> list[str]:
        """Texts of exactly so many tokens, each with its own beginning, so that no cached beginning is met again."""
        texts = []
        for number in range(count):
            text = f"{mark} {number}"
            while (length := len(self._ids(text))) < tokens:
                text += f" {WORDS[length % len(WORDS)]}" if tokens - length > 12 else "."
            texts.append(text)
        return texts

    def _repeating_prompt(self, number: int) -> str:
        """Of the circling model: a text that it copies but for some words; else words that come again and again."""
        if self.circles:
            return Rings(_tokenizer(self.model), ALL_FILLERS).prompt(7 * number, f"{number} r")
        text = f"{number} r"
        while len(self._ids(f"{text} {' '.join(WORDS)}")) < _REPEATED_TOKENS:
            text += f" {' '.join(WORDS)}"
        return text

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its output included."""
        repeating = [_REPEATED_TOKENS] if self.repeating else []
        return max(self.prompt_tokens, self.stream_prompt_tokens, *repeating) + self.output_tokens

    @property
    def kv_tokens(self) -> int:
        """KV cache for all that is asked at once, and for as much again that earlier rounds left behind."""
        one = self.stream_prompt_tokens + self.output_tokens
        needed = [(1, self.longest), *((count, one) for count in self.streams)]
        return max(2 * count * (tokens // TOKENS_PER_BLOCK + 2) * TOKENS_PER_BLOCK for count, tokens in needed)

    def settings(self) -> dict[str, Any]:
        """For the report: what all its rows have in common."""
        return {
            "model": self.model.name, "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens,
            "stream_prompt_tokens": self.stream_prompt_tokens, "streams": list(self.streams),
            "repeating": self.repeating,
        }  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = _tokenizer(self.model).encode(text, add_special_tokens=False).ids
        return ids


@functools.cache
def _tokenizer(model: Path) -> Any:
    return Tokenizer.from_file(str(model / "tokenizer.json"))
