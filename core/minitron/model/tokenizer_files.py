"""The files of a tokenizer: which there are, what they say, and whether the server will be able to open them.

tokenizer.json decides: it says itself how text becomes ids and what is put around a text, as for transformers 5, which
leaves ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json aside where there is one
(``tokenization_utils_base.py``, ``_from_pretrained``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.errors import EngineError, InputError, values_as_input
from minitron.model import chat_template
from minitron.text import end_ids
from minitron.text.tokenizer import load, named_tokens, parsed

log = logging.getLogger(__name__)

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
#: What transformers needs to load a tokenizer and to write a chat. Code is not among it.
NAMES = (TOKENIZER, SENTENCEPIECE, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, chat_template.FILE, "vocab.json",
         "merges.txt")  # fmt: skip
#: What a tokenizer would be made of, if the server could read it; only the first is served.
_CORE = (TOKENIZER, SENTENCEPIECE, "vocab.json")
_ADVICE = "make one with the package transformers (AutoTokenizer.from_pretrained, save_pretrained)"


def read(folder: Path) -> dict[str, bytes]:
    """Content of the files in ``folder`` by name; none where there is no tokenizer."""
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def present(folder: Path, served: tuple[str, ...] = (TOKENIZER,)) -> list[str]:
    """The names of the files in ``folder``, generation_config.json with them; EngineError where none is ``served``."""
    if not any((folder / name).is_file() for name in served):
        others = [name for name in _CORE if (folder / name).is_file()]
        held = f"has {others[0]} without {TOKENIZER}: {_ADVICE}" if others else f"holds no tokenizer ({TOKENIZER})"
        raise EngineError(f"{folder} {held}; a text model cannot be served without one; convert and build again")
    return [name for name in (*NAMES, GENERATION_CONFIG) if (folder / name).is_file()]


def opened(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The tokenizer in ``folder`` as the server has it (``tokenizers.Tokenizer``), and its tokenizer_config.json.

    Raises InputError where there is none, or it is broken.
    """
    try:
        return load(folder)
    except ValueError as error:
        raise InputError(f"{error}; put the served model's tokenizer there, or name the folder that has it") from error


def check(content: Mapping[str, bytes], vocab_size: int, where: str) -> None:
    """Open what the server will open; raises InputError.

    ``content`` is by name, and may have no tokenizer at all. The tokenizer must have no more ids than the model.
    """
    for name in (CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG):
        if name in content:
            _object(content[name], f"{where}/{name}")
    if TOKENIZER not in content:
        if others := [name for name in _CORE if name in content]:
            raise InputError(f"{where} has {others[0]} without {TOKENIZER}, which alone is served; {_ADVICE}")
        return
    size = _size(content[TOKENIZER], f"{where}/{TOKENIZER}")
    if size > vocab_size:
        raise InputError(
            f"{where} has ids up to {size - 1}, and the model knows {vocab_size}: it is the tokenizer of another model"
        )
    tokenizer = _open(content[TOKENIZER], f"{where}/{TOKENIZER}")
    for token, (key, name) in enumerate(
        _unknown(tokenizer, content), size
    ):  # which transformers adds behind the others
        line = f"{where}/{CONFIG} names {name!r} ({key}), which {TOKENIZER} does not have"
        if token >= vocab_size:
            raise InputError(
                f"{line}; it would be token {token}, and the model knows {vocab_size}; correct one of them"
            )
        log.warning("%s; it becomes token %d", line, token)
    for line in (*contradictions(content), *_without_end(content), *_broken_chat(content)):
        log.warning("%s: %s", where, line)


def check_end_ids(folder: Path, vocab_size: int) -> None:
    """Raise EngineError where an id that ends the model's texts is unreadable, or none of the engine's."""
    try:
        ends = end_ids.of_model(folder)
    except ValueError as error:
        raise EngineError(str(error)) from error
    if foreign := [end for end in ends if end >= vocab_size]:
        raise EngineError(
            f"{folder / GENERATION_CONFIG} ends texts with id {foreign[0]}, and the engine knows {vocab_size}: "
            "it is of another model; convert and build with the right one"
        )


def check_chat_template(folder: Path) -> None:
    """Raise EngineError where the template by which chats are written cannot write one."""
    if found := chat_template.problem(read(folder)):
        name, said = found
        raise EngineError(
            f"{folder / name}: the chat template is broken: {said}; correct it, or take it out: chats are then refused"
        )


def usable_ids(generation_config: bytes, vocab_size: int, where: str) -> bytes:
    """generation_config.json without ids that no model of so many tokens can say; as it is where there are none.

    Raises InputError for what is no id.
    """
    content = _object(generation_config, where)
    changed = dict(content)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = content.get(key)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in ids):
            raise InputError(f"{where}: {key} is {found!r}, and a whole number is needed, or a list of them")
        kept = [token for token in ids if 0 <= token < vocab_size]
        if len(kept) < len(ids):
            log.warning("%s: %s %s is no token of %d; left out", where, key, found, vocab_size)
            changed[key] = kept if isinstance(found, list) and kept else None
    if changed == content:
        return generation_config
    kept_keys = {key: value for key, value in changed.items() if value is not None}
    return (json.dumps(kept_keys, indent=2) + "\n").encode()


def contradictions(content: Mapping[str, bytes]) -> list[str]:
    """Flags of tokenizer_config.json that say something else than what tokenizer.json does."""
    if TOKENIZER not in content or CONFIG not in content:
        return []
    config = _object(content[CONFIG], CONFIG)
    around = _around(_object(content[TOKENIZER], TOKENIZER).get("post_processor"))
    said = []
    for flag, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        name = end_ids.token_text(config.get(token))
        if isinstance(config.get(flag), bool) and name is not None and config[flag] != (name in around):
            does = f"puts {name} around a text" if name in around else f"does not put {name} around a text"
            said.append(f"{CONFIG} says {flag} {json.dumps(config[flag])}, and {TOKENIZER} {does}; {TOKENIZER} decides")
    return said


def vocabulary_size(folder: Path) -> int | None:
    """Highest token id of ``folder``/tokenizer.json plus one; None where there is only a SentencePiece file."""
    path = folder / TOKENIZER
    return _size(path.read_bytes(), str(path)) if path.is_file() else None


def wants_special_tokens(folder: Path) -> bool:
    """Whether tokens are put around a text: as tokenizer.json says, whatever flags are beside it, else as the flags do.

    Without a word of either, the tokenizer's class is left to decide.
    """
    if (folder / TOKENIZER).is_file():
        processor = _object((folder / TOKENIZER).read_bytes(), str(folder / TOKENIZER)).get("post_processor")
        return bool(_around(processor)) or not _is_known(processor)
    path = folder / CONFIG
    config = _object(path.read_bytes(), str(path)) if path.is_file() else {}
    asked = [config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key) is not None]
    return any(asked) if asked else True


def _without_end(content: Mapping[str, bytes]) -> list[str]:
    """A line where nothing says which token ends a text."""
    ids = _object(content.get(GENERATION_CONFIG, b"{}"), GENERATION_CONFIG).get("eos_token_id")
    named = _object(content.get(CONFIG, b"{}"), CONFIG).get("eos_token")
    if ids in (None, []) and not named:
        return ["no token is known to end a text: every answer goes on to max_tokens, unless stop words are given"]
    return []


def _broken_chat(content: Mapping[str, bytes]) -> list[str]:
    """A line where chats cannot be written; texts can."""
    found = chat_template.problem(content)
    return [f"{found[0]}: the chat template is broken: {found[1]}; no repository is rendered with it"] if found else []


def _around(processor: Any) -> set[str]:
    """The special tokens that a post-processor of tokenizer.json puts around one text."""
    if not isinstance(processor, dict):
        return set()
    steps = processor.get("processors") or []
    found = set().union(*map(_around, steps)) if isinstance(steps, list) else set()
    for item in processor.get("single") or []:
        if isinstance(item, dict) and isinstance(item.get("SpecialToken"), dict):
            found.add(str(item["SpecialToken"].get("id")))
    return found | {pair[0] for pair in (processor.get("cls"), processor.get("sep")) if isinstance(pair, list) and pair}


def _is_known(processor: Any) -> bool:
    """Whether ``_around`` reads all of it."""
    if not isinstance(processor, dict):
        return processor is None
    kind = processor.get("type")
    if kind == "Sequence":
        return all(map(_is_known, processor.get("processors") or []))
    return kind in ("TemplateProcessing", "ByteLevel", "BertProcessing", "RobertaProcessing")


def _size(raw: bytes, where: str) -> int:
    content = _object(raw, where)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = [token["id"] for token in content.get("added_tokens") or [] if isinstance(token, dict) and "id" in token]
    if isinstance(vocabulary, dict):
        added += vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: the position is the id
        added.append(len(vocabulary) - 1)
    if not added or not all(isinstance(number, int) for number in added):
        raise InputError(f"{where} holds no vocabulary")
    return int(max(added)) + 1


def _unknown(tokenizer: Any, content: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Key and text of the special tokens of tokenizer_config.json that the tokenizer has not."""
    named = named_tokens(_object(content.get(CONFIG, b"{}"), CONFIG))
    return [(token.key, text) for text, token in named.items() if tokenizer.token_to_id(text) is None]


def _open(raw: bytes, where: str) -> Any:
    with values_as_input():
        tokenizer = parsed(raw, where)
    for token in _object(raw, where).get("added_tokens") or []:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:  # the package gives them the next free id
            declared = f"{where} has {token['content']!r} as token {token['id']}"
            advice = "the ids of added tokens must follow on the vocabulary's"
            raise InputError(f"{declared}, and the package tokenizers makes it {found}; {advice}")
    return tokenizer


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} holds no JSON object")
    return content
