"""A SentencePiece BPE tokenizer as the files that a Hugging Face folder holds, and the same filled up to more ids.

``tokenizer.json`` is what transformers and the toolkit read; ``tokenizer.model`` is SentencePiece's own file, beside
it as in the folders of the real models. Both give the same ids (a test compares them on mixed text).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.errors import UsageError

#: Ids 0 to 3 in the order of NemotronConfig's defaults: bos_token_id 2, eos_token_id 3.
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")
_SPACE = "\u2581"  # how SentencePiece writes a space
_UNUSED = 5  # sentencepiece_model.proto, ModelProto.SentencePiece.Type: decoded, never encoded


def write(folder: Path, model: bytes, pieces: Sequence[tuple[str, float]], max_length: int) -> None:
    """Write all tokenizer files for a SentencePiece BPE model with byte fallback, a space put before the text, no
    normalisation and ``SPECIAL_TOKENS`` first.

    ``pieces`` are (piece, score) in the order of their ids; ``max_length`` is the longest input in tokens.
    """
    (folder / "tokenizer.model").write_bytes(model)
    _write_json(folder / "tokenizer.json", _tokenizer_json(pieces))
    unk, pad, bos, eos = SPECIAL_TOKENS
    names = {"unk_token": unk, "pad_token": pad, "bos_token": bos, "eos_token": eos}
    _write_json(folder / "special_tokens_map.json", names)
    added = {str(i): _special(token) for i, token in enumerate(SPECIAL_TOKENS)}
    config = {"add_bos_token": False, "add_eos_token": False, "added_tokens_decoder": added} | names
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
    _write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _tokenizer_json(pieces: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Spell the model for the `tokenizers` package.

    SentencePiece merges the neighbours whose joint piece scores best; merges listed by falling score, every way to cut
    a piece in two known ones among them, make the `tokenizers` BPE do the same.
    """
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    by_score = sorted((item for item in pieces if item[0] not in SPECIAL_TOKENS), key=lambda item: -item[1])
    merges = [
        [piece[:cut], piece[cut:]]
        for piece, _ in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and not _is_byte(piece)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _special(token) for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL_TOKENS[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _special(token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": token} | flags


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


class TokenizerTooLarge(UsageError):
    """A model's vocabulary has fewer ids than the tokenizer that it should get."""


def fill(source: Path, folder: Path, vocab_size: int) -> None:
    """Copy the tokenizer of the model folder ``source`` into ``folder``, filled up to ``vocab_size`` ids.

    No text is encoded to an added id, but each decodes to a word that names it: 1999 to " <1999>". Raises
    TokenizerTooLarge where the tokenizer has more ids than that.
    """
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    if len(vocabulary) > vocab_size:
        raise TokenizerTooLarge(
            f"the tokenizer of {source} has {len(vocabulary)} ids and the model only {vocab_size}; "
            "make the model without a tokenizer, or its vocabulary larger"
        )
    added = [f"{_SPACE}<{i}>" for i in range(len(vocabulary), vocab_size)]
    vocabulary |= {piece: i for i, piece in enumerate(added, len(vocabulary))}
    _write_json(folder / "tokenizer.json", tokenizer)
    # A protobuf message that is continued behind its end is the two merged: more entries in its list of pieces.
    model = (source / "tokenizer.model").read_bytes() + b"".join(map(_unused_piece, added))
    (folder / "tokenizer.model").write_bytes(model)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)


def _unused_piece(piece: str) -> bytes:
    """Spell one entry of ModelProto.pieces (field 1): piece (1, string), score (2, float), type (3, enum)."""
    text = piece.encode()
    entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([_UNUSED])
    return b"\x0a" + bytes([len(entry)]) + entry


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
