"""A SentencePiece vocabulary, whichever file it comes from, as the files that a Hugging Face folder has.

Pieces, scores and types; the best score of two neighbours is merged first; bytes where a character is no piece. The
types are SentencePiece's own (``sentencepiece_model.proto``, ModelProto.SentencePiece.Type), and GGUF's.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNKNOWN_NAME = "<unk>"
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """Pieces with their scores and types, by id, and what is put around a text.

    ``begin``, ``end`` and ``padding`` are ids, None where the file names none; ``ends`` are all that end a text.
    ``charsmap`` is SentencePiece's compiled normalisation, empty where characters stay as they are; ``trim_spaces`` is
    its removal of spaces at both ends and of the second of two; ``isolated`` are its user-defined pieces, found after
    that, where others are found before it.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    begin: int | None
    end: int | None
    padding: int | None
    ends: tuple[int, ...]
    add_begin: bool
    add_end: bool
    add_space: bool
    chat_template: str | None = None
    charsmap: bytes = b""
    trim_spaces: bool = False
    isolated: tuple[int, ...] = ()

    def with_type(self, *kinds: int) -> list[int]:
        """Ids of the pieces of these types."""
        return [i for i, kind in enumerate(self.types) if kind in kinds]

    @property
    def unknown(self) -> int | None:
        """What stands for what has no piece: by its type, or, where that says special only, by its usual name.

        The file's own ``unknown_token_id`` is not looked at: llama.cpp's converter writes 1 for every Nemotron.
        """
        named = (i for i in self.with_type(CONTROL) if self.pieces[i] == _UNKNOWN_NAME)
        return next(iter(self.with_type(UNKNOWN)), next(named, None))

    def name(self, token: int | None) -> str | None:
        """The piece of a token."""
        return None if token is None else self.pieces[token]


def files(vocabulary: Vocabulary, own_config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """tokenizer.json and its companions; ``own_config`` is what a tokenizer_config.json said already."""
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
        "tokenizer_config.json": _json(dict(own_config or {}) | config | special),
        "special_tokens_map.json": _json(special),
    }


def generation_config(begin: int | None, ends: Sequence[int]) -> bytes:
    """generation_config.json with the tokens that begin and end a text: one id, or a list where several end it."""
    end: Any = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return _json({key: ids for key, ids in {"bos_token_id": begin, "eos_token_id": end}.items() if ids is not None})


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Spell the vocabulary for the ``tokenizers`` package."""
    has_bytes = bool(vocabulary.with_type(BYTE))
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if vocabulary.add_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.add_space else []
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _added(vocabulary, i) for i in _added_ids(vocabulary)],
        "normalizer": {"type": "Sequence", "normalizers": [*_cleaning(vocabulary), *prepend, replace]},
        "pre_tokenizer": _isolating(vocabulary),
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
            "ignore_merges": bool(vocabulary.isolated),
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": _merges(vocabulary),
        },
    }


def _cleaning(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """What SentencePiece does to a text before anything is put before it."""
    found: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        charsmap = base64.b64encode(vocabulary.charsmap).decode()
        found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if vocabulary.trim_spaces:
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
            found.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return found


def _merges(vocabulary: Vocabulary) -> list[list[str]]:
    """All ways to make a piece of two others, the piece with the best score first.

    SentencePiece merges those neighbours whose joint piece scores best; ``tokenizers`` goes by the order of this list.
    """
    normal = vocabulary.with_type(NORMAL)
    known = {vocabulary.pieces[i] for i in normal}
    by_score = sorted(normal, key=lambda i: -vocabulary.scores[i])
    return [
        [piece[:cut], piece[cut:]]
        for piece in (vocabulary.pieces[i] for i in by_score)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _isolating(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Cut user-defined pieces out, the longest first; each is a piece of the vocabulary as a whole."""
    pieces = sorted((vocabulary.pieces[i] for i in vocabulary.isolated), key=len, reverse=True)
    if not pieces:
        return None
    pattern = {"Regex": "|".join(map(re.escape, pieces))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _added_ids(vocabulary: Vocabulary) -> list[int]:
    found = vocabulary.with_type(UNKNOWN, CONTROL, USER_DEFINED)
    return [i for i in found if i not in vocabulary.isolated]


def _added(vocabulary: Vocabulary, token: int) -> dict[str, Any]:
    """A piece that is found in a text as a whole, before anything is merged."""
    own = vocabulary.types[token] == USER_DEFINED
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
