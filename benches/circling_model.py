"""A random model whose text is known before it speaks: each token has one successor, whatever came before.

``bench_cpu`` measures it because random weights alone never repeat themselves, and a server that drafts tokens is as
fast as its drafts are taken. Two matrices of ``models/random_model`` are written over: the embedding is scaled up until
it outweighs what the layers add to it, and the head's row of a token is the (unscaled) embedding row of the token that
it follows. So the best logit leads by far, in every precision; sizes, types and cost of a token are what they were.

The successors make two rings. ``Rings.circle`` are ``LENGTH`` words of the tokenizer: a prompt that holds them in this
order, with every ``CHANGED_EVERY``-th word another, is a text that the model goes on to copy except for those words,
as a summary copies its source and an edit its code. All other tokens follow each other by their ids: a text that
repeats nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
LENGTH, CHANGED_EVERY = 96, 16
_SPECIAL = 4  # ids below this are <unk>, <pad>, <s>, </s>; nothing leads to them
_SCALE = 512.0  # a power of two, so that bfloat16 is scaled exactly; the 4B shape's embedding gets a spread of 9
_PIECE_ROWS = 4096


class Rings:
    """Which token follows which, for a tokenizer; ``avoided``: words that prompts of other kinds are made of."""

    def __init__(self, tokenizer: Tokenizer, avoided: str) -> None:
        taken = set(tokenizer.encode(avoided, add_special_tokens=False).ids)
        words = [id_ for id_ in range(_SPECIAL, tokenizer.get_vocab_size()) if id_ not in taken]
        words = [id_ for id_ in words if _is_a_word(tokenizer, id_)][: LENGTH + LENGTH // CHANGED_EVERY]
        assert len(words) == LENGTH + LENGTH // CHANGED_EVERY, "the tokenizer has too few words"
        #: The tokens of the ring that is copied, in order.
        self.circle = words[:LENGTH]
        self._others = words[LENGTH:]
        self._tokenizer = tokenizer

    def successors(self, vocab_size: int) -> NDArray[np.int64]:
        """The token that follows each, int64 [vocab_size]; a special one follows itself."""
        follows = np.arange(vocab_size)
        rest = np.setdiff1d(np.arange(_SPECIAL, vocab_size), self.circle)
        for ring in (np.asarray(self.circle), rest):
            follows[ring] = np.roll(ring, -1)
        return follows

    def prompt(self, start: int, mark: str) -> str:
        """A text that begins with ``mark``, goes once around from place ``start``, and has begun to do so again."""
        ids = [*self.circle[start % LENGTH :], *self.circle[: start % LENGTH]]
        again = ids[:4]
        ids[CHANGED_EVERY - 1 :: CHANGED_EVERY] = self._others
        text: str = mark + "".join(f" {self._tokenizer.decode([id_])}" for id_ in [*ids, *again])
        found = self._tokenizer.encode(text, add_special_tokens=False).ids
        assert found[-len(ids) - len(again) :] == [*ids, *again], "the tokenizer reads the words otherwise"
        return text


def _is_a_word(tokenizer: Tokenizer, id_: int) -> bool:
    """Whether the token stands for a whole word of letters wherever one begins."""
    word = tokenizer.decode([id_])
    if not (word.isascii() and word.isalpha() and len(word) > 1):
        return False
    return bool(tokenizer.encode(f"the {word} {word}", add_special_tokens=False).ids[-2:] == [id_, id_])


def write(output: Path, shape: str, avoided: str) -> Path:
    """Make the model of a shape of ``models/random_model``, as a Hugging Face folder, unless it is there."""
    if not output.exists():
        partial = output.with_name(output.name + ".partial")
        script = ROOT / "models" / "random_model.py"
        subprocess.run([sys.executable, script, "--shape", shape, "--output", partial, "--force"], check=True)
        turn(partial, Rings(Tokenizer.from_file(str(partial / "tokenizer.json")), avoided))
        partial.rename(output)
    return output


def turn(model: Path, rings: Rings) -> None:
    """Write over embedding and head of a bfloat16 model with a head of its own."""
    embedding = _matrix(model, "model.embed_tokens.weight")
    head = _matrix(model, "lm_head.weight")
    follows = rings.successors(len(embedding))
    for start in range(0, len(embedding), _PIECE_ROWS):
        rows = embedding[start : start + _PIECE_ROWS]
        head[follows[start : start + _PIECE_ROWS]] = rows
        rows[:] = (rows.astype(np.float32) * np.float32(_SCALE)).astype(rows.dtype)
    embedding.base.flush()  # type: ignore[union-attr]
    head.base.flush()  # type: ignore[union-attr]


def _matrix(model: Path, name: str) -> NDArray[Any]:
    """A tensor of the folder, mapped for writing (safetensors: length of the header, the header in JSON, the bytes)."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        if name in header:
            at, shape = 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"])
            assert header[name]["dtype"] == "BF16", header[name]
            return np.memmap(path, np.uint16, "r+", at, shape).view(ml_dtypes.bfloat16)
    raise AssertionError(f"{model} has no {name}")
