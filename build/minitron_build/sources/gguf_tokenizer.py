"""The tokenizer in a GGUF file's metadata.

Only the SentencePiece kind (``tokenizer.ggml.model`` "llama") that Minitron uses. Keys and types: github
ggml-org/llama.cpp, ``gguf-py/gguf/constants.py``; what is assumed where a key is absent, and which pieces are known by
their text: ``src/llama-vocab.cpp``. docs/gguf.md lists every key of the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.errors import ModelError
from minitron_build.sources.gguf_file import Value
from minitron_build.sources.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

PIECES = "tokenizer.ggml.tokens"
_SUPPRESSED = "tokenizer.ggml.suppress_tokens"
#: Keys of tokens that end a text.
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
#: Pieces that end a text wherever they are in a vocabulary ...
_END_PIECES = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
))  # fmt: skip
#: ... and pieces that are special where no key names another in their place; the last three kinds end a text too.
_PIECES_WITHOUT_KEY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("fim_pre", "prefix"): ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>",
                            "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ("fim_suf", "suffix"): ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>",
                            "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ("fim_mid", "middle"): ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>",
                            "\u2581<MID>", "<|code_middle|>", "<|middle|>"),
    ("fim_pad",): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("fim_rep",): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("fim_sep",): ("<|file_sep|>",),
}  # fmt: skip
#: Pieces that are shown in any case.
_SHOWN_PIECES = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


def read(metadata: Mapping[str, Value], vocab_size: int, where: str) -> Vocabulary:
    """Check and gather the tokenizer's keys; raises ModelError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        held = "has no tokenizer" if kind is None else f"has a tokenizer of kind {kind!r}, which is not read here"
        raise ModelError(f"{where} {held}; give the folder of a Hugging Face tokenizer with --tokenizer")
    reader = _Reader(metadata, vocab_size, where)
    pieces, types = reader.pieces(), reader.numbers("tokenizer.ggml.token_type", "iu")
    if types.count(UNKNOWN) > 1 or not set(types) <= set(range(NORMAL, BYTE + 1)):
        raise ModelError(f"{where}: tokenizer.ggml.token_type must have types 1 to 6, and 2 (unknown) at most once")
    padding, suppressed = reader.token("padding"), metadata.get(_SUPPRESSED)
    if isinstance(suppressed, (list, np.ndarray)) and len(suppressed):
        raise ModelError(f"{where}: {_SUPPRESSED} names {len(suppressed)} tokens, which cannot be kept out here")
    ends = _ends(reader, pieces)
    return Vocabulary(
        pieces=pieces,
        scores=reader.numbers("tokenizer.ggml.scores", "f"),
        types=_types(reader, pieces, types, ends),
        begin=reader.token("bos"),
        end=reader.token("eos"),
        # llama.cpp's converter writes 0 for a Nemotron whatever the tokenizer says.
        padding=padding if padding is not None and types[padding] == CONTROL else None,
        ends=ends,
        add_begin=reader.flag("add_bos_token", True),
        add_end=reader.flag("add_eos_token", False),
        add_space=reader.flag("add_space_prefix", True),
        chat_template=reader.chat_template(),
    )


def special_ids(metadata: Mapping[str, Value], vocab_size: int, where: str) -> tuple[int | None, tuple[int, ...]]:
    """The tokens that begin and that end a text, of a tokenizer of any kind; raises ModelError."""
    reader = _Reader(metadata, vocab_size, where)
    return reader.token("bos"), _ends(reader, reader.pieces() if PIECES in metadata else [])


def _ends(reader: _Reader, pieces: list[str]) -> tuple[int, ...]:
    """Every token that ends a text, the one of the key ``eos`` first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = [token for name in _END_KEYS if (token := reader.token(name)) is not None]
    texts = {text for names, text in _known_by_text(reader) if names[0] in _END_KEYS} | _END_PIECES
    found += sorted(ids[text] for text in texts if text in ids)
    taken_back = set(_no_ends(pieces, found))
    return tuple(token for token in dict.fromkeys(found) if token not in taken_back)


def _known_by_text(reader: _Reader) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of ``_PIECES_WITHOUT_KEY`` whose keys are not there."""
    for names, texts in _PIECES_WITHOUT_KEY.items():
        if all(reader.token(name) is None for name in names):
            yield from ((names, text) for text in texts)


def _no_ends(pieces: list[str], ends: list[int]) -> Iterator[int]:
    """What llama.cpp takes back: <|end|> between calls of tools, </s> where there is another family's end."""
    texts = {pieces[token]: token for token in ends if token < len(pieces)}
    calls = texts.keys() & {"<|call|>", "<|calls|>"}
    if "<|end|>" in texts and (("<|return|>" in texts and calls) or ("<|flush|>" in texts and calls)):
        yield texts["<|end|>"]
    if "</s>" in texts and "<|tool_response>" in texts:
        yield texts["</s>"]


def _types(reader: _Reader, pieces: list[str], types: list[int], ends: tuple[int, ...]) -> list[int]:
    """Types as the file has them, but for the pieces that are known by their text."""
    special = {text for _, text in _known_by_text(reader)}
    changed = list(types)
    for token, piece in enumerate(pieces):
        if piece in special or (piece in _END_PIECES and token in ends):
            changed[token] = CONTROL
        elif piece in _SHOWN_PIECES or piece == "<|end|>":
            changed[token] = USER_DEFINED
    return changed


@dataclass(frozen=True)
class _Reader:
    metadata: Mapping[str, Value]
    size: int
    where: str

    def pieces(self) -> list[str]:
        pieces = self.metadata.get(PIECES)
        if not isinstance(pieces, list) or len(pieces) != self.size:
            raise ModelError(f"{self.where}: {PIECES} are not {self.size} strings, one for each row of the model")
        named = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]  # as llama.cpp names what has no name
        if len(set(named)) != len(named):
            twice = Counter(named).most_common(1)[0][0]
            raise ModelError(f"{self.where}: {PIECES} has the piece {twice!r} twice")
        return named

    def numbers(self, key: str, kinds: str) -> list[Any]:
        values = self.metadata.get(key)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or len(values) != self.size:
            raise ModelError(f"{self.where}: {key} are not {self.size} numbers, one for each row of the model")
        if not np.isfinite(values).all():
            raise ModelError(f"{self.where}: {key} has values that are not finite")
        return list(values.tolist())

    def token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token = self.metadata.get(key)
        if token is not None and (isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.size):
            raise ModelError(f"{self.where}: {key} is {token!r}, and the model has {self.size} tokens")
        return token

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: tokenizer.ggml.{name} is {value!r}, and true or false is needed")
        return value

    def chat_template(self) -> str | None:
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None
