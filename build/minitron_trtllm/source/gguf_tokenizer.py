"""The tokenizer in a GGUF file's metadata, as the files that a Hugging Face folder has.

Only the SentencePiece kind (``tokenizer.ggml.model`` "llama") that Minitron uses: pieces, scores and types, the best
score of two neighbours merged first, bytes where a character is no piece. Keys and types: github ggml-org/llama.cpp,
``gguf-py/gguf/constants.py`` (TokenType); what is assumed where a key is absent: ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_trtllm.errors import ModelError
from minitron_trtllm.source.gguf_file import Value

PIECES = "tokenizer.ggml.tokens"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNKNOWN_NAME = "<unk>"
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """Pieces with their scores and types, by id, and what is put around a text.

    ``begin`` and ``end`` are ids, None where the file names none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    begin: int | None
    end: int | None
    padding: int | None
    add_begin: bool
    add_end: bool
    add_space: bool
    chat_template: str | None

    def with_type(self, *kinds: int) -> list[int]:
        """Ids of the pieces of these types."""
        return [i for i, kind in enumerate(self.types) if kind in kinds]

    @property
    def unknown(self) -> int | None:
        """What stands for what has no piece: by its type, or, where that says special only, by its usual name.

        The file's own ``unknown_token_id`` is not looked at: llama.cpp's converter writes 1 for every Nemotron.
        """
        named = (i for i in self.with_type(_CONTROL) if self.pieces[i] == _UNKNOWN_NAME)
        return next(iter(self.with_type(_UNKNOWN)), next(named, None))

    def name(self, token: int | None) -> str | None:
        """The piece of a token."""
        return None if token is None else self.pieces[token]


def files(metadata: Mapping[str, Value], vocab_size: int, where: str) -> dict[str, bytes]:
    """tokenizer.json and its companions; raises ModelError."""
    vocabulary = read(metadata, vocab_size, where)
    special = {
        "unk_token": vocabulary.name(vocabulary.unknown),
        "bos_token": vocabulary.name(vocabulary.begin),
        "eos_token": vocabulary.name(vocabulary.end),
        "pad_token": vocabulary.name(vocabulary.padding),
    }
    special = {key: piece for key, piece in special.items() if piece is not None}
    config = {
        "add_bos_token": vocabulary.add_begin,
        "add_eos_token": vocabulary.add_end,
        "added_tokens_decoder": {str(i): _added(vocabulary, i) for i in _added_ids(vocabulary)},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return {
        "tokenizer.json": _json(tokenizer_json(vocabulary)),
        "tokenizer_config.json": _json(config | special),
        "special_tokens_map.json": _json(special),
    }


def generation_config(metadata: Mapping[str, Value], vocab_size: int, where: str) -> bytes:
    """generation_config.json with the tokens that begin and end a text; raises ModelError."""
    reader = _Reader(metadata, vocab_size, where)
    ids = {f"{name}_token_id": reader.token(name) for name in ("bos", "eos")}
    return _json({key: token for key, token in ids.items() if token is not None})


def read(metadata: Mapping[str, Value], vocab_size: int, where: str) -> Vocabulary:
    """Check and gather the tokenizer's keys; raises ModelError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        held = "has no tokenizer" if kind is None else f"has a tokenizer of kind {kind!r}, which is not read here"
        raise ModelError(f"{where} {held}; give the folder of a Hugging Face tokenizer with --tokenizer")
    reader = _Reader(metadata, vocab_size, where)
    pieces, types = reader.pieces(), reader.numbers("tokenizer.ggml.token_type", "iu")
    if types.count(_UNKNOWN) > 1 or not set(types) <= set(range(_NORMAL, _BYTE + 1)):
        raise ModelError(f"{where}: tokenizer.ggml.token_type must have types 1 to 6, and 2 (unknown) at most once")
    padding = reader.token("padding")
    return Vocabulary(
        pieces=pieces,
        scores=reader.numbers("tokenizer.ggml.scores", "f"),
        types=types,
        begin=reader.token("bos"),
        end=reader.token("eos"),
        # llama.cpp's converter writes 0 for a Nemotron whatever the tokenizer says.
        padding=padding if padding is not None and types[padding] == _CONTROL else None,
        add_begin=reader.flag("add_bos_token", True),
        add_end=reader.flag("add_eos_token", False),
        add_space=reader.flag("add_space_prefix", True),
        chat_template=reader.chat_template(),
    )


@dataclass(frozen=True)
class _Reader:
    metadata: Mapping[str, Value]
    size: int
    where: str

    def pieces(self) -> list[str]:
        pieces = self.metadata.get(PIECES)
        if not isinstance(pieces, list) or len(pieces) != self.size:
            raise ModelError(f"{self.where}: {PIECES} are not {self.size} strings, one for each row of the model")
        if len(set(pieces)) != len(pieces):
            raise ModelError(f"{self.where}: {PIECES} has a piece twice")
        return pieces

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


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Spell the vocabulary for the ``tokenizers`` package."""
    has_bytes = bool(vocabulary.with_type(_BYTE))
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if vocabulary.add_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.add_space else []
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _added(vocabulary, i) for i in _added_ids(vocabulary)],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": _around(vocabulary),
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.name(vocabulary.unknown),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": _merges(vocabulary),
        },
    }


def _merges(vocabulary: Vocabulary) -> list[list[str]]:
    """All ways to make a piece of two others, the piece with the best score first.

    SentencePiece merges those neighbours whose joint piece scores best; ``tokenizers`` goes by the order of this list.
    """
    normal = vocabulary.with_type(_NORMAL)
    known = {vocabulary.pieces[i] for i in normal}
    by_score = sorted(normal, key=lambda i: -vocabulary.scores[i])
    return [
        [piece[:cut], piece[cut:]]
        for piece in (vocabulary.pieces[i] for i in by_score)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _added_ids(vocabulary: Vocabulary) -> list[int]:
    return vocabulary.with_type(_UNKNOWN, _CONTROL, _USER_DEFINED)


def _added(vocabulary: Vocabulary, token: int) -> dict[str, Any]:
    """A piece that is found in a text as a whole, before anything is merged."""
    own = vocabulary.types[token] == _USER_DEFINED
    content = vocabulary.pieces[token].replace(_SPACE, " ") if own else vocabulary.pieces[token]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content} | flags | {"special": not own}


def _around(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Tokens before and after each text, where the file asks for them."""
    before = [vocabulary.begin] if vocabulary.add_begin and vocabulary.begin is not None else []
    after = [vocabulary.end] if vocabulary.add_end and vocabulary.end is not None else []
    if not before and not after:
        return None

    def template(which: str, kind: int) -> list[dict[str, Any]]:
        def special(tokens: list[int]) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": vocabulary.pieces[i], "type_id": kind}} for i in tokens]

        return [*special(before), {"Sequence": {"id": which, "type_id": kind}}, *special(after)]

    tokens = {vocabulary.pieces[i]: {"id": vocabulary.pieces[i], "ids": [i], "tokens": [vocabulary.pieces[i]]}
              for i in (*before, *after)}  # fmt: skip
    pair = template("A", 0) + template("B", 1)
    return {"type": "TemplateProcessing", "single": template("A", 0), "pair": pair, "special_tokens": tokens}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
