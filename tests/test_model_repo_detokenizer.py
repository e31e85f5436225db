"""The text that arrives in pieces: joined, it is the text decoded at once, and stop strings are found at any border.

The judge of decoding is the tokenizer's own whole decode; the judge of stop strings is ``str.find``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conftest import SMALL_MODEL
from minitron.text.detokenizer import Detokenizer
from minitron.text.stop_strings import StopStrings
from minitron.text.tokenizer import TextTokenizer

TEXTS = (
    "  two  spaces, é, 日本語, \U0001f600\U0001f1e9\U0001f1ea!\n\ttab\n",
    "naïve — “quoted” ½",
    " lead",
    "x" * 40,
    "\ufffd?",
)
FEW = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def byte_level(folder: Path) -> TextTokenizer:
    """A byte-level BPE as GPT-2's, whose tokens split characters anywhere."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    raw.train_from_iterator(TEXTS * 20, trainer)
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    return TextTokenizer(str(folder))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextTokenizer, int]]:
    """A SentencePiece-style tokenizer (the small Minitron's) and a byte-level one, with their numbers of ids."""
    level = byte_level(tmp_path_factory.mktemp("tokenizers") / "byte-level")
    return {"sentencepiece": (TextTokenizer(str(SMALL_MODEL)), 1024), "byte_level": (level, 400)}


def joined(tokenizer: TextTokenizer, context: list[int], pieces: list[list[int]]) -> str:
    detokenizer = Detokenizer(tokenizer, context)
    return "".join([*(detokenizer.feed(piece) for piece in pieces), detokenizer.finish()])


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@FEW
@given(data=st.data())
def test_joined_pieces_of_any_ids_are_the_whole_decode(
    tokenizers: dict[str, tuple[TextTokenizer, int]], kind: str, data: st.DataObject
) -> None:
    tokenizer, size = tokenizers[kind]
    # Bytes of the fallback (ids 4 to 259) and special tokens (0 to 3) more often than by chance.
    token = st.one_of(st.integers(0, size - 1), st.integers(0, 12), st.integers(130, 259))
    pieces = data.draw(st.lists(st.lists(token, max_size=3), max_size=25))
    ids = [token for piece in pieces for token in piece]
    assert joined(tokenizer, [], pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@FEW
@given(prompt=st.text(max_size=20), text=st.text(max_size=40), size=st.integers(1, 4))
@example(prompt="The quick", text=" brown fox", size=1)
@example(prompt="line\n", text="next", size=1)
def test_behind_a_prompt_the_text_goes_on_where_the_prompt_ended(
    tokenizers: dict[str, tuple[TextTokenizer, int]], kind: str, prompt: str, text: str, size: int
) -> None:
    tokenizer, _ = tokenizers[kind]
    ids, context = tokenizer.encode(prompt + text), tokenizer.encode(prompt)
    if ids[: len(context)] != context:  # a merge across the border: these ids are no continuation of the prompt
        return
    rest = ids[len(context) :]
    pieces = [rest[start : start + size] for start in range(0, len(rest), size)]
    assert tokenizer.decode(context) + joined(tokenizer, context, pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_a_broken_character(
    tokenizers: dict[str, tuple[TextTokenizer, int]], kind: str, text: str
) -> None:
    tokenizer, _ = tokenizers[kind]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([token]) for token in tokenizer.encode(text)] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_text_comes_as_soon_as_it_is_certain(tokenizers: dict[str, tuple[TextTokenizer, int]]) -> None:
    tokenizer, _ = tokenizers["sentencepiece"]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("the man and the sea")
    assert all(detokenizer.feed([token]) for token in ids)  # no id without text, none held back


@given(
    words=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab c", max_size=4), max_size=12),
)
@settings(max_examples=500, deadline=None)
@example(words=["aab"], pieces=["aa", "ab"])
@example(words=["ab", "b"], pieces=["a", "b"])
def test_stop_strings_cut_the_text_at_the_first_one(words: list[str], pieces: list[str]) -> None:
    stops = StopStrings(words)
    out, text = "", ""
    for piece in pieces:
        out += stops.feed(piece)
        text += piece
        ends = [place for place in map(text.find, words) if place >= 0]
        assert stops.found == bool(ends)
        if ends:
            # The earliest place known when the first stop string was complete.
            assert out == text[: min(ends)]
            return
        assert text.startswith(out)
        held = text[len(out) :]
        assert not held or any(word.startswith(held) for word in words)  # nothing is held back in vain
    assert out + stops.finish() == text
