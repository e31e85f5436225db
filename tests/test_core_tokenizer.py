"""The served tokenizer opens folders as transformers does, without it; the judge is transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from conftest import SMALL_MODEL
from minitron.errors import InputError
from minitron.text.tokenizer import TextTokenizer
from minitron_client.bench.requests import tokenizer_count
from minitron_client.parity.stored import encode

TEXTS = (
    "the sea",
    "  two  spaces\n",
    "<s>the</s> sea",
    "é 日本 \U0001f600",
    "a [X] b <y>z",
    "",
    "the [X]",
    "<pad><pad> the",
)
Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


#: What is changed in tokenizer.json and in tokenizer_config.json.
CASES: dict[str, Edit] = {
    "as it is": lambda _json, _config: None,
    "cut and padded": lambda json_, _config: json_.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                 "pad_type_id": 0, "pad_token": "<pad>"},
    ),
    "an end that the vocabulary has not": lambda _json, config: config.update(eos_token="[X]"),
    "a plain word is the padding": lambda _json, config: config.update(pad_token="the"),
    "a token that is only in the configuration": lambda _json, config: config.setdefault(
        "added_tokens_decoder", {}).update({"1024": token("<y>", lstrip=True)}),
    "a special one that is only there": lambda _json, config: config.setdefault(
        "added_tokens_decoder", {}).update({"1024": token("[X]", special=True, rstrip=True)}),
    "more special tokens": lambda _json, config: config.update(additional_special_tokens=["[X]", "<y>"]),
    "a mask that wants the space before it": lambda _json, config: config.update(
        mask_token=token("[X]", lstrip=True, special=True) | {"__type": "AddedToken"}),
    "no special tokens named": lambda _json, config: [config.pop(key) for key in [*config] if key.endswith("_token")],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ids_texts_and_special_tokens_are_transformers_own(case: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    files = {name: json.loads((SMALL_MODEL / name).read_text(encoding="utf-8"))
             for name in ("tokenizer.json", "tokenizer_config.json")}  # fmt: skip
    CASES[case](files["tokenizer.json"], files["tokenizer_config.json"])
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for skips in (True, False):
        ours = TextTokenizer(str(tmp_path), skip_special_tokens=skips)
        for text in TEXTS:
            ids = ours.encode(text)
            assert ids == judge.encode(text), text
            assert ours.decode(ids) == judge.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    assert ours.pad_id == (judge.pad_token_id if judge.pad_token_id is not None else 0)
    everything = list(range(len(judge)))
    assert ours.decode(everything) == judge.decode(everything, clean_up_tokenization_spaces=False)


def test_a_chat_template_is_only_used_where_chats_are(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((SMALL_MODEL / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    said = [{"role": "user", "content": "the sea"}]
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = judge.encode("<user>the sea", add_special_tokens=False)
    assert TextTokenizer(str(tmp_path), chats=True).encode_chat(said) == expected
    assert TextTokenizer(str(tmp_path)).has_chat_template
    assert not TextTokenizer(str(SMALL_MODEL), chats=True).has_chat_template


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be opened"):
        TextTokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "broken"])
@pytest.mark.parametrize("reads", [tokenizer_count, encode])
def test_tools_refuse_a_folder_without_the_served_tokenizer(
    reads: Callable[[Path], object], content: str | None, tmp_path: Path
) -> None:
    """What is wrong, where, and what to do, in the same words wherever one is opened."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="put the served model's tokenizer there") as refused:
        reads(tmp_path)
    assert f"{path} cannot be opened: " in str(refused.value)


def test_tools_count_what_the_server_counts(tmp_path: Path) -> None:
    """A tokenizer.json that cuts texts off, which the server does not let it: ids of the original, which does not."""
    (tmp_path / "tokenizer_config.json").write_bytes((SMALL_MODEL / "tokenizer_config.json").read_bytes())
    content = json.loads((SMALL_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    text, judge = "in the beginning God created the heaven", Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    CASES["cut and padded"](content, {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_count(tmp_path)(text) == len(judge.encode(text).ids) > 3
    assert encode(tmp_path, [text]) == [judge.encode(text, add_special_tokens=False).ids]
