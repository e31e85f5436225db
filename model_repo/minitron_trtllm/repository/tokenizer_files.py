"""Which files make a tokenizer, how many tokens it knows, and whether it wants special tokens around a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_trtllm.errors import EngineError
from minitron_trtllm.models.tensorrt_llm import end_ids

#: What transformers needs to load a tokenizer, and the ids that end a text. Code is not among it.
NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def present(folder: Path) -> list[str]:
    """The names of the tokenizer files in ``folder``; raises EngineError where they make no tokenizer."""
    names = [name for name in NAMES if (folder / name).is_file()]
    if "tokenizer.json" not in names and "tokenizer.model" not in names:
        raise EngineError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model), and a text model cannot be served "
            "without one; convert a model that has one, and build again"
        )
    return names


def vocabulary_size(folder: Path) -> int | None:
    """Highest token id of ``folder``/tokenizer.json plus one; None where there is only a SentencePiece file."""
    if not (folder / "tokenizer.json").is_file():
        return None
    raw = _load(folder / "tokenizer.json")
    model = raw.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = [token["id"] for token in raw.get("added_tokens") or [] if isinstance(token, dict) and "id" in token]
    if isinstance(vocabulary, dict):
        added += vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: the position is the id
        added.append(len(vocabulary) - 1)
    if not added or not all(isinstance(number, int) for number in added):
        raise EngineError(f"{folder / 'tokenizer.json'} holds no vocabulary")
    return int(max(added)) + 1


def check_end_ids(folder: Path, vocab_size: int) -> None:
    """Raise EngineError where an id that ends the model's texts is unreadable, or none of the engine's."""
    try:
        ends = end_ids.of_model(folder)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if foreign := [end for end in ends if end >= vocab_size]:
        raise EngineError(
            f"{folder / 'generation_config.json'} ends texts with id {foreign[0]}, and the engine knows {vocab_size}: "
            "it is of another model; convert and build with the right one"
        )


def wants_special_tokens(folder: Path) -> bool:
    """Whether the tokenizer's own config asks for a begin or end token; silence leaves it to tokenizer.json."""
    path = folder / "tokenizer_config.json"
    config = _load(path) if path.is_file() else {}
    asked = [config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key) is not None]
    return any(asked) if asked else True


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise EngineError(f"{path} holds no JSON object")
    return raw
