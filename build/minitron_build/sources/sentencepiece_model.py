"""A SentencePiece model, ``tokenizer.model``, read from its protobuf without any package.

Fields: github google/sentencepiece, ``src/sentencepiece_model.proto``. Of a message only what is named here is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron.errors import ModelError
from minitron.model import tokenizer_files
from minitron_build.sources import vocabulary
from minitron_build.sources.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_BPE = 2
_KINDS = {1: "unigram", 3: "word", 4: "char"}
_ADVICE = "save it as tokenizer.json with the package transformers (AutoTokenizer.from_pretrained, save_pretrained)"


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside a model say of its tokens: ``names`` by key (bos_token, ...), ``added`` ones by id.

    Of these: text, and whether special.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[int, tuple[str, bool]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def files(content: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """tokenizer.json and its companions, of the model file ``where`` and what is beside it by name.

    Raises ModelError.
    """
    try:
        special = _special_tokens(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"the files beside {where} cannot be read ({error}); get them again") from error
    made = read(content[tokenizer_files.SENTENCEPIECE], special, where)
    return vocabulary.files(made, special.config)


def _special_tokens(content: Mapping[str, bytes]) -> SpecialTokens:
    config, named, added = (
        json.loads(content.get(name, b"{}"))
        for name in (tokenizer_files.CONFIG, tokenizer_files.SPECIAL_TOKENS, tokenizer_files.ADDED_TOKENS)
    )
    names = {key: value["content"] if isinstance(value, dict) else value
             for key, value in (named | config).items()
             if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value is not None}  # fmt: skip
    tokens = {int(number): (text, text in names.values()) for text, number in added.items()}
    tokens |= {int(number): (token["content"], bool(token.get("special", False)))
               for number, token in config.get("added_tokens_decoder", {}).items()}  # fmt: skip
    return SpecialTokens(names, tokens, config)


def read(raw: bytes, special: SpecialTokens, where: str) -> Vocabulary:
    """The vocabulary of a model file's content with the tokens added to it; raises ModelError.

    Without a flag nothing is put around a text, as by transformers 5 for a Nemotron
    (``tokenization_utils_tokenizers.py``).
    """
    pieces, scores, types, trainer, normalizer = _model(raw, where)
    kind = trainer.get(3, 1)
    if kind != _BPE or trainer.get(24, 0) or not normalizer.get(5, 1):
        said = f"of the kind {_KINDS[kind]!r}" if kind in _KINDS else "that treats spaces in another way"
        raise ModelError(f"{where} is a SentencePiece model {said}, and only 'bpe' is read here; {_ADVICE}")
    own = tuple(i for i, of in enumerate(types) if of == USER_DEFINED and i not in special.added)
    _add(special.added, pieces, scores, types, where)
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise ModelError(f"{where} has a piece twice; get the file again")

    def token(name: str, number: int, default: int) -> int | None:
        """By the name that the tokenizer's config gives it, else by the id in the model."""
        if name in special.names:
            if special.names[name] not in ids:
                raise ModelError(f"{where} has no piece {special.names[name]!r}, which the tokenizer's {name} is")
            return ids[special.names[name]]
        found = trainer.get(number, default)
        found = found - (1 << 64) if found >= 1 << 63 else found
        return found if 0 <= found < len(pieces) else None

    end = token("eos_token", 42, 2)
    return Vocabulary(
        pieces=pieces,
        scores=scores,
        types=types,
        begin=token("bos_token", 41, 1),
        end=end,
        padding=token("pad_token", 43, -1),
        ends=() if end is None else (end,),
        add_begin=bool(special.config.get("add_bos_token", False)),
        add_end=bool(special.config.get("add_eos_token", False)),
        add_space=bool(normalizer.get(3, 1)),
        charsmap=normalizer.get(2, b""),
        trim_spaces=bool(normalizer.get(4, 1)),
        isolated=own,
    )


def _add(
    added: Mapping[int, tuple[str, bool]], pieces: list[str], scores: list[float], types: list[int], where: str
) -> None:
    """Put the tokens that the folder's other files add behind the model's own; what it has already must be the same."""
    for number, (text, is_special) in sorted(added.items()):
        if number < len(pieces):
            if pieces[number] != text:
                raise ModelError(
                    f"{where} has {pieces[number]!r} as token {number}, and the tokenizer's config {text!r}"
                )
            if types[number] in (NORMAL, CONTROL):
                types[number] = CONTROL if is_special else USER_DEFINED
        elif number == len(pieces):
            pieces.append(text)
            scores.append(0.0)
            types.append(CONTROL if is_special else USER_DEFINED)
        else:
            raise ModelError(f"{where} has {len(pieces)} tokens, and {text!r} is added as {number}: none is between")


def _model(raw: bytes, where: str) -> tuple[list[str], list[float], list[int], dict[int, Any], dict[int, Any]]:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(raw):
            if number == _PIECES:
                piece = dict(_fields(value))
                pieces.append(piece[_PIECE].decode())
                scores.append(struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0])
                types.append(piece.get(_TYPE, NORMAL))
            elif number == _TRAINER:
                trainer |= dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces or not set(types) <= set(range(NORMAL, BYTE + 1)) or types.count(UNKNOWN) > 1:
        raise ModelError(f"{where} is no SentencePiece model, or a damaged one; if it is of another kind, {_ADVICE}")
    return pieces, scores, types, trainer, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or the bytes of what is longer (protobuf's wire format)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, position = _varint(message, position)
        if length is None or position + length > len(message):
            raise ValueError("no protobuf")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value, position, shift = value | (byte & 127) << shift, position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("no protobuf")
