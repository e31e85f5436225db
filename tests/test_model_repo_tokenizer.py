"""Texts to the inputs of tensorrt_llm: ids, limits, word lists; in the real shared code, without a server.

Expected ids are those of the package ``tokenizers`` on the same tokenizer.json; word lists are spelled by hand after
the contract (row 0 ids, row 1 ends, then -1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from triton_config import flag, one_line

from conftest import SMALL_MODEL
from minitron.model import tokenizer_files
from minitron.text.errors import RequestError
from minitron.text.prompts import PromptMaker
from minitron.text.tokenizer import TextTokenizer

LIMITS = {"max_input_len": "8", "max_seq_len": "12", "vocab_size": "1024"}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(str(SMALL_MODEL))


@pytest.fixture(scope="module")
def maker(tokenizer: TextTokenizer) -> PromptMaker:
    return PromptMaker(tokenizer, LIMITS)


def texts(*words: str | bytes) -> Any:
    return np.array([[word.encode() if isinstance(word, str) else word] for word in words], dtype=object)


def lengths(*numbers: int) -> Any:
    return np.array([[number] for number in numbers], np.int32)


def test_ids_are_the_tokenizer_s_own(tokenizer: TextTokenizer) -> None:
    judge = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    for text in ("the sea", "  two  spaces\n", "é 日本 \U0001f600", ""):
        assert tokenizer.encode(text) == judge.encode(text).ids
        assert tokenizer.decode(judge.encode(text).ids) == text


def test_end_and_pad_ids_come_from_generation_config(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((SMALL_MODEL / name).read_bytes())
    assert (TextTokenizer(str(tmp_path)).end_ids, TextTokenizer(str(tmp_path)).pad_id) == ((3,), 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 5}))
    several = TextTokenizer(str(tmp_path))
    assert (several.end_ids, several.pad_id) == ((7, 9), 5)
    prompt = PromptMaker(several, LIMITS).make(texts("the"), lengths(2))
    assert prompt.end_id.tolist() == [[7]]
    assert prompt.stop_words_list.tolist() == [[[9], [1]]]  # the second end id is a stop word
    asked = PromptMaker(several, LIMITS).make(texts("the"), lengths(2), end_id=lengths(4), pad_id=lengths(6))
    assert (asked.end_id.tolist(), asked.pad_id.tolist(), asked.stop_words_list.size) == ([[4]], [[6]], 0)


def test_a_batch_is_padded_to_the_right(maker: PromptMaker, tokenizer: TextTokenizer) -> None:
    prompt = maker.make(texts("the", "the sea and"), lengths(2, 3))
    long = tokenizer.encode("the sea and")
    assert prompt.input_ids.tolist() == [tokenizer.encode("the") + [1] * (len(long) - 1), long]
    assert prompt.input_lengths.tolist() == [[1], [len(long)]]
    assert prompt.request_output_len.tolist() == [[2], [3]]


def test_word_lists_are_spelled_both_ways_and_empty_words_are_none(
    maker: PromptMaker, tokenizer: TextTokenizer
) -> None:
    empty = maker.make(texts("the"), lengths(2), stop_words=texts(""))
    assert empty.stop_words_list.shape == empty.bad_words_list.shape == (1, 2, 0)
    lead = tokenizer.encode("\n")
    first, inside = tokenizer.encode("sea"), tokenizer.encode("\nsea")[len(lead) :]
    assert first != inside  # with and without the space that SentencePiece puts before a text
    found = maker.make(texts("the", "a"), lengths(2, 2), stop_words=np.array([[b"sea", b""], [b"", b""]], dtype=object))
    ids, ends = [*first, *inside], [len(first), len(first) + len(inside)]
    row = [ids, ends + [-1] * (len(ids) - 2)]
    assert found.stop_words_list.tolist() == [row, [[0] * len(ids), [-1] * len(ids)]]


def test_embedding_bias_adds_weights_to_the_ids_of_words(maker: PromptMaker, tokenizer: TextTokenizer) -> None:
    words, weights = np.array([[b"", b"the"]], dtype=object), np.array([[9.0, 2.5]], np.float32)
    bias = maker.make(texts("a"), lengths(1), bias_words=words, bias_weights=weights).embedding_bias
    assert bias.shape == (1, 1024)
    assert {int(i): float(bias[0, i]) for i in np.nonzero(bias[0])[0]} == dict.fromkeys(tokenizer.encode("the"), 2.5)
    with pytest.raises(RequestError, match="same number"):
        maker.make(texts("a"), lengths(1), bias_words=words, bias_weights=weights[:, :1])


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("", 1, "the prompt is empty"),
        ("the " * 20, 1, "takes at most 8"),
        ("the sea", 0, "output of 0 tokens"),
        ("the sea", -1, "output of -1 tokens"),
        ("the sea", 11, "more than the 12"),
        (b"\xff\xfe", 1, "not valid UTF-8"),
    ],
)
def test_what_the_engine_could_not_take_is_refused(maker: PromptMaker, text: str, count: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        maker.make(texts(text), lengths(count))


def test_errors_are_one_line_without_paths() -> None:
    assert one_line("bad\nTraceback (most recent call last):\n  File x") == "bad"
    assert one_line("cannot open /opt/secret/engine/rank0.engine: gone") == "cannot open (path): gone"
    assert one_line("a ratio of 3/4 and/or 1/2") == "a ratio of 3/4 and/or 1/2"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 10_000)) == 500
    assert [flag(word) for word in ("True", "1", "false", "yes")] == [True, True, False, False]


def test_special_tokens_are_asked_for_by_the_tokenizer_s_config(tmp_path: Path) -> None:
    for config, wanted in (({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True),
                           ({"add_bos_token": False, "add_eos_token": True}, True)):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert tokenizer_files.wants_special_tokens(tmp_path) == wanted
