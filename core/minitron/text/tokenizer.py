"""The served tokenizer: text to ids, ids to text, and the ids that end and pad.

Needs the package transformers (4.57 or 5) without torch. Only tokenizer.json is served: it says itself how text becomes
ids, so no class of transformers has a say in it, and no code of the model's authors runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.text import end_ids
from minitron.text.errors import RequestError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextTokenizer:
    """A tokenizer folder, loaded. Safe to use from several threads."""

    def __init__(self, folder: str, *, add_special_tokens: bool = True, skip_special_tokens: bool = True) -> None:
        self._tokenizer = _load(folder)
        self._add_special, self._skip_special = add_special_tokens, skip_special_tokens
        self._special = frozenset(self._tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._bytes = frozenset(i for token, i in self._tokenizer.get_vocab().items() if _BYTE.fullmatch(token))
        self.end_ids = end_ids.of_model(Path(folder))
        pads = (end_ids.generation_config(Path(folder)).get("pad_token_id"), self._tokenizer.pad_token_id)
        self.pad_id: int = next((pad for pad in pads if pad is not None), (self.end_ids or (0,))[0])

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, with the special tokens that the tokenizer puts around one."""
        return list(self._tokenizer.encode(text, add_special_tokens=self._add_special))

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where its next answer begins; ``messages`` have ``role`` and ``content``.

        Raises RequestError where the template refuses them.
        """
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own refusal, or what it stumbles over
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_word(self, word: str) -> list[list[int]]:
        """The ways in which ``word`` is spelled in ids: at the start of a text, and right behind another character.

        They differ where a tokenizer puts a space before a text, as SentencePiece does.
        """
        first = self._tokenizer.encode(word, add_special_tokens=False)
        lead = self._tokenizer.encode("\n", add_special_tokens=False)
        behind = self._tokenizer.encode("\n" + word, add_special_tokens=False)
        inside = behind[len(lead) :] if behind[: len(lead)] == lead else []
        ways = [list(ids) for ids in (first, inside) if ids]
        return ways[:1] if len(ways) == 2 and ways[0] == ways[1] else ways

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; equal for every version of transformers (no cleaning up of spaces)."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def is_skipped(self, token: int) -> bool:
        """Whether ``decode`` leaves this id out."""
        return token in self._special

    def is_byte(self, token: int) -> bool:
        """Whether this id stands for one raw byte (SentencePiece's byte fallback)."""
        return token in self._bytes


def _load(folder: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about torch or lengths in the server's log
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
