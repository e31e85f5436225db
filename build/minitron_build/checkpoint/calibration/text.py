"""The calibration text: sequences of token ids, cut from a text file or from the lines of a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron import files
from minitron.errors import InputError, UsageError

Ids = npt.NDArray[np.int64]

SEQUENCES, TOKENS = 32, 512


@dataclass(frozen=True)
class CalibrationText:
    """A text ``file``, of which ``sequences`` of ``tokens`` are taken: *.jsonl with a "text" a line, else UTF-8."""

    file: Path
    sequences: int = SEQUENCES
    tokens: int = TOKENS

    def about(self) -> dict[str, Any]:
        """What the manifest keeps of it, as JSON values; raises InputError."""
        try:
            content = files.sha256_file(self.file)
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error.strerror}") from error
        return {"file": str(self.file), "sha256": content, "sequences": self.sequences, "tokens": self.tokens}

    def ids(self, tokenizer: bytes, vocab_size: int, longest: int) -> Ids:
        """Token ids [sequences, tokens] by the tokenizer.json ``tokenizer``, without special tokens.

        The documents follow each other; the sequences lie evenly over the whole. Fewer where there is less text. Raises
        UsageError for a length above ``longest``, InputError for a text that is too short or of another model.
        """
        from tokenizers import Tokenizer

        if self.sequences < 1 or not 2 <= self.tokens <= longest:
            raise UsageError(
                f"calibration of {self.sequences} sequences of {self.tokens} tokens: at least 1 sequence of 2 to "
                f"{longest} tokens (what the model takes at once) is needed"
            )
        encoder = Tokenizer.from_str(tokenizer.decode())
        found = encoder.encode_batch(self._documents(), add_special_tokens=False)
        ids = np.concatenate([np.asarray(each.ids, np.int64) for each in found])
        available = len(ids) // self.tokens
        if not available:
            raise InputError(f"{self.file} has {len(ids)} tokens; {self.tokens} make one sequence of a calibration")
        if ids.max() >= vocab_size:
            raise InputError(f"{self.file}: token {ids.max()} is beyond the {vocab_size} of the model; its tokenizer?")
        chosen = np.linspace(0, available - 1, min(self.sequences, available)).round().astype(int)
        return np.asarray(ids[: available * self.tokens].reshape(available, self.tokens)[chosen])

    def _documents(self) -> list[str]:
        content = files.read_text(self.file)
        if self.file.suffix != ".jsonl":
            return [content]
        documents = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, TypeError, KeyError):
                documents.append(None)
            if not isinstance(documents[-1], str):
                raise InputError(f'{self.file}:{number} is no JSON object with a "text"; one on each line is needed')
        return documents or [""]
