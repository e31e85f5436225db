"""The served tokenizer: text to ids, ids to text, and the ids that end and pad.

Needs the package ``tokenizers`` alone: only tokenizer.json is served, and it says itself how text becomes ids. What
transformers (4.57 and 5) adds to it when it loads a folder is added here too: special tokens that only the folder's
configuration names. A chat template is transformers' own business: where one is used, that package is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from minitron.text import end_ids
from minitron.text.end_ids import token_text
from minitron.text.errors import RequestError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: Keys of tokenizer_config.json that name special tokens, in transformers' order, which new ones get their ids in.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class TextTokenizer:
    """A tokenizer folder, loaded. Safe to use from several threads."""

    def __init__(
        self, folder: str, *, add_special_tokens: bool = True, skip_special_tokens: bool = True, chats: bool = False
    ) -> None:
        """``chats``: whether conversations will be encoded; needs transformers where the tokenizer has a template.

        Raises ValueError, naming the file, where one cannot be read.
        """
        place = Path(folder)
        self._tokenizer, config = load(place)
        self._add_special, self._skip_special = add_special_tokens, skip_special_tokens
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special and skip_special_tokens)
        self._bytes = frozenset(i for token, i in self._tokenizer.get_vocab().items() if _BYTE.fullmatch(token))
        self.end_ids = end_ids.of_model(place)
        pad = token_text(config.get("pad_token"))
        pads = (end_ids.generation_config(place).get("pad_token_id"), pad and self._tokenizer.token_to_id(pad))
        self.pad_id: int = next((pad for pad in pads if isinstance(pad, int)), (self.end_ids or (0,))[0])
        self.has_chat_template = bool(config.get("chat_template")) or (place / "chat_template.jinja").is_file()
        self._chats = _transformers(folder) if chats and self.has_chat_template else None

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, with the special tokens that the tokenizer puts around one."""
        return self._encode(text, self._add_special)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where its next answer begins; ``messages`` have ``role`` and ``content``.

        Raises RequestError where the template refuses them, or there is none.
        """
        if self._chats is None:
            raise RequestError("the tokenizer has no chat template")
        try:
            text = self._chats.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own refusal, or what it stumbles over
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        return self._encode(text, False)

    def encode_word(self, word: str) -> list[list[int]]:
        """The ways in which ``word`` is spelled in ids: at the start of a text, and right behind another character.

        They differ where a tokenizer puts a space before a text, as SentencePiece does.
        """
        first = self._encode(word, False)
        lead = self._encode("\n", False)
        behind = self._encode("\n" + word, False)
        inside = behind[len(lead) :] if behind[: len(lead)] == lead else []
        ways = [ids for ids in (first, inside) if ids]
        return ways[:1] if len(ways) == 2 and ways[0] == ways[1] else ways

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without any cleaning up of spaces."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special))

    def is_skipped(self, token: int) -> bool:
        """Whether ``decode`` leaves this id out."""
        return token in self._special

    def is_byte(self, token: int) -> bool:
        """Whether this id stands for one raw byte (SentencePiece's byte fallback)."""
        return token in self._bytes

    def _encode(self, text: str, add_special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)


def load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The folder's tokenizer as it is served (``tokenizers.Tokenizer``), and its tokenizer_config.json.

    Raises ValueError, naming the file, where one cannot be read.
    """
    from tokenizers import AddedToken

    path = folder / "tokenizer.json"
    tokenizer = parsed(path, str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = end_ids.tokenizer_config(folder)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    new = [AddedToken(text, special=token.is_special, **token.flags)
           for text, token in named_tokens(config).items() if text not in known]  # fmt: skip
    if new:
        tokenizer.add_tokens(new)
    return tokenizer, config


def parsed(content: Path | bytes, where: str) -> Any:
    """What a tokenizer.json alone says (``tokenizers.Tokenizer``), by its path or its content.

    Raises ValueError, naming ``where``, for what the package does not take.
    """
    from tokenizers import Tokenizer

    try:
        if isinstance(content, Path):
            return Tokenizer.from_file(str(content))
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{where} cannot be opened: {' '.join(str(error).split())[:300]}") from error


@dataclass
class Named:
    """A token that a tokenizer_config.json names: the first ``key`` that does, and the ``flags`` that it gives it."""

    key: str
    flags: dict[str, bool]
    is_special: bool = False


def named_tokens(config: Mapping[str, Any]) -> dict[str, Named]:
    """Every token that a tokenizer_config.json names, by its text, in the order in which new ones get their ids."""
    named: dict[str, Named] = {}
    decoder = config.get("added_tokens_decoder")
    numbered = {int(key): token for key, token in decoder.items() if key.isdecimal()} if _is_object(decoder) else {}
    for _, token in sorted(numbered.items(), key=lambda item: item[0]):
        if (text := token_text(token)) is not None and _is_object(token):
            named[text] = Named("added_tokens_decoder", _flags(token), bool(token.get("special")))
    others = [key for key in config if key.endswith("_token") and key not in _NAMED]
    listed = [(key, config[key]) for key in (*_NAMED, *others) if key in config]
    for key in _LISTED:
        more = config.get(key)
        more = list(more.values()) if _is_object(more) else more
        listed += [(key, token) for token in more] if isinstance(more, list) else []
    for key, token in listed:
        if (text := token_text(token)) is not None:
            named.setdefault(text, Named(key, _flags(token))).is_special = True
    return named


def _flags(token: Any) -> dict[str, bool]:
    """How the text around a token is treated, as far as its object says."""
    return {name: bool(token[name]) for name in _FLAGS if name in token} if _is_object(token) else {}


def _is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _transformers(folder: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about torch or lengths in the server's log
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
