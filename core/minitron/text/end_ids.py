"""The tokens that end a text of the model: its own set, and what the ``end_id`` of a request stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def of_model(folder: Path) -> tuple[int, ...]:
    """The model's own end ids, in their order: eos_token_id of ``folder``/generation_config.json, a number or a list.

    Where that says none, the tokenizer's eos token, which its config names and tokenizer.json gives the id of
    (transformers' rule). Empty where there is neither. Raises ValueError, naming the file.
    """
    given = generation_config(folder).get("eos_token_id")
    if given is None:
        return _of_tokenizer(folder)
    ids = given if isinstance(given, list) else [given]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(f"{folder / 'generation_config.json'} has eos_token_id {given!r}: token ids are needed")
    return tuple(dict.fromkeys(ids))


def generation_config(folder: Path) -> Mapping[str, Any]:
    """``folder``/generation_config.json, empty where there is none; raises ValueError, naming the file."""
    return _read(folder / "generation_config.json")


def tokenizer_config(folder: Path) -> Mapping[str, Any]:
    """``folder``/tokenizer_config.json, empty where there is none; raises ValueError, naming the file.

    An older folder has its special tokens in special_tokens_map.json, which counts there.
    """
    config = _read(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else {**config, **_read(folder / "special_tokens_map.json")}


def token_text(token: Any) -> str | None:
    """A token's text, which a configuration gives as it is or in an object; None where it gives none."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def meant_by(end_id: int, own: Sequence[int]) -> frozenset[int]:
    """What a request's ``end_id`` ends a sequence with; below 0 nothing does.

    TensorRT-LLM's backend knows one end id for a request, and a model may have several: one of the model's own stands
    for all of them. Any other ends alone.
    """
    if end_id < 0:
        return frozenset()
    return frozenset(own) if end_id in own else frozenset({end_id})


def _of_tokenizer(folder: Path) -> tuple[int, ...]:
    text = token_text(tokenizer_config(folder).get("eos_token"))
    if text is None:
        return ()
    tokenizer = _read(folder / "tokenizer.json")
    added = {one.get("content"): one.get("id") for one in tokenizer.get("added_tokens") or [] if isinstance(one, dict)}
    found = added.get(text, _vocabulary(tokenizer).get(text))
    return (found,) if isinstance(found, int) else ()


def _vocabulary(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: pieces with their scores, and the place is the id
        return {piece[0]: place for place, piece in enumerate(vocab)}
    return dict(vocab)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    return raw
