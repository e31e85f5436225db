"""The small Minitron's TOKENIZER.json gives what SentencePiece gives on its TOKENIZER.model, on any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tokenizer_files
from conftest import SMALL_MODEL

MIXED = [
    "In the beginning God created the heaven and the earth.",
    "def f(x: int) -> str:\n\treturn  x ** 2  # ok",
    "naïve café, Ünïcödé, e\u0301 combining, ﬁ ligature ½ ①",
    "emoji 🎉 👩‍👩‍👧 and flags 🇩🇪",
    "日本語と中文 한국어 العربية",
    " leading", "  two leading and  double   spaces  ", "trailing ", " ", "   ", "\n\n", "\r\n\t",
    "0123456789 3.14 1e-5", "\x00\x01\x7f", "▁already▁there", "<0x41> is no byte", "aaaaaaa LORDLORD thththe", "",
]  # fmt: skip


TOKENIZER = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(SMALL_MODEL / "tokenizer.model"))


@pytest.mark.parametrize("text", MIXED)
def test_ids_and_text_equal_sentencepieces(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert ids == REFERENCE.encode(text)
    assert TOKENIZER.decode(ids) == REFERENCE.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("aehtnd LORDsi,.\n\té日🎉<0x>▁12"), max_size=60) | st.text(max_size=30))
def test_ids_equal_sentencepieces_on_anything(text: str) -> None:
    assume(not any(token in text for token in tokenizer_files.SPECIAL_TOKENS))
    assert TOKENIZER.encode(text).ids == REFERENCE.encode(text)


@pytest.mark.parametrize("token", tokenizer_files.SPECIAL_TOKENS)
def test_a_special_token_in_the_text_is_one_for_tokenizers_and_plain_text_for_sentencepiece(token: str) -> None:
    """The one known difference: every tokenizer.json that transformers makes of a SentencePiece model has it."""
    assert TOKENIZER.token_to_id(token) in TOKENIZER.encode(f"a{token}b").ids
    assert REFERENCE.piece_to_id(token) not in REFERENCE.encode(f"a{token}b")


@pytest.mark.parametrize("text", [text for text in MIXED if "▁" not in text])
def test_text_comes_back_whole(text: str) -> None:
    """White space, unknown letters and bytes survive (the sign for a space itself becomes one)."""
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_the_files_are_what_is_made_of_the_sentencepiece_model(tmp_path: Path) -> None:
    """So what is held above of the committed files holds of those that the next training writes."""
    pieces = [(REFERENCE.id_to_piece(i), REFERENCE.get_score(i)) for i in range(REFERENCE.vocab_size())]
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    model = (SMALL_MODEL / "tokenizer.model").read_bytes()
    tokenizer_files.write(tmp_path, model, pieces, config["max_position_embeddings"])
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (SMALL_MODEL / made.name).read_bytes(), made.name
    assert len(list(tmp_path.iterdir())) == 4


def test_unknown_letters_become_bytes() -> None:
    """UTF-8 of é is C3 A9; the bytes' pieces are named after them."""
    assert TOKENIZER.encode("é").tokens[-2:] == ["<0xC3>", "<0xA9>"]


def test_transformers_loads_it_without_torch_and_adds_nothing() -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(SMALL_MODEL)
    assert loaded("And God said")["input_ids"] == loaded.convert_tokens_to_ids(["▁And", "▁God", "▁said"])
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (2, 3, 0)
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)
    assert len(loaded) == config["vocab_size"]
