"""The text of a comparison: its tokens, and the windows that they are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minitron import files
from minitron.errors import InputError, UsageError
from minitron.model import tokenizer_files
from minitron_build.evaluate.candidate import Candidate

_DEFAULT_CONTEXT = 512

Ids = npt.NDArray[np.int64]
Windows = list[Ids]


def token_ids(candidate: Candidate, file: Path) -> Ids:
    """The ids of a UTF-8 text by the subject's tokenizer, without special tokens; raises InputError."""
    tokenizer, _ = tokenizer_files.opened(candidate.engine / "tokenizer")
    return np.array(tokenizer.encode(files.read_text(file), add_special_tokens=False).ids, np.int64)


def cut(ids: Ids, context: int | None, longest: int) -> Windows:
    """Windows of ``context`` ids (512, or ``longest``, unless given); raises UsageError, InputError."""
    if context is not None and not 2 <= context <= longest:
        raise UsageError(f"--context {context} must be from 2 to the {longest} tokens that the reference takes at once")
    length = context or min(_DEFAULT_CONTEXT, longest)
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise InputError(f"the text has {len(ids)} tokens, and at least 2 are needed")
    return windows


def predicted(windows: Sequence[Ids]) -> int:
    """Tokens that are predicted: all of each window but its first."""
    return sum(len(window) - 1 for window in windows)
