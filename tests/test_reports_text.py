"""Text is read as text: the tokens of a file are those of its bytes, whatever ends its lines (llama.cpp#1444).

Right is what the package ``tokenizers`` makes of the bytes, decoded by hand.
"""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from conftest import SMALL_MODEL
from minitron import files
from minitron.errors import InputError
from minitron_build.evaluate import text as quality_text
from minitron_cli.commands import generate
from minitron_client.bench import requests

#: (what, the bytes of a file)
TEXTS: dict[str, bytes] = {
    "ends of lines of Windows": b"In the\r\nbeginning\r\n",
    "ends of lines of an old Mac": b"In the\rbeginning\r",
    "all of them": b"a\nb\r\nc\rd\n\r",
    "no end at the end": b"In the beginning",
    "spaces and ends at the end": b"  In the beginning \n\n",
    "a mark of the byte order": b"\xef\xbb\xbfIn the beginning",
    "characters that split lines elsewhere": "a\u2028b\u0085c\x0bd\x0ce\x1cf".encode(),
    "a byte of zero": b"a\x00b",
    "nothing": b"",
}  # fmt: skip


@pytest.fixture(params=TEXTS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file, and what is in it."""
    (tmp_path / "text").write_bytes(TEXTS[request.param])
    return tmp_path / "text", TEXTS[request.param].decode("utf-8")


def prompt(**arguments: Any) -> str:
    return generate._prompt(Namespace(**({"prompt": None, "file": None} | arguments)))


def test_a_prompt_from_a_file_and_from_stdin_is_the_same(
    file: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = file
    assert prompt(file=path) == right
    stdin = io.TextIOWrapper(io.BytesIO(path.read_bytes()), encoding="ascii", newline=None)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert prompt() == right


def test_a_text_to_predict_is_tokenised_as_it_is(file: tuple[Path, str], tmp_path: Path) -> None:
    path, right = file
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((SMALL_MODEL / "tokenizer.json").read_bytes())
    subject: Any = SimpleNamespace(engine=tmp_path, name="small")
    judge = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    assert quality_text.token_ids(subject, path).tolist() == judge.encode(right, add_special_tokens=False).ids


@pytest.mark.parametrize("ascii_only", [True, False])
def test_prompts_of_a_load_are_what_the_lines_hold(file: tuple[Path, str], ascii_only: bool) -> None:
    """JSON may hold U+2028 and others as they are: only a line feed ends a line of JSONL (jsonlines.org)."""
    path, right = file
    row = json.dumps({"prompt": right, "max_tokens": 3}, ensure_ascii=ascii_only)
    path.write_bytes(f"{row}\r\n\n{row}\n".encode())
    assert requests._prompt_file(path) == [(right, 3)] * 2
    conversation = [{"conversations": [{"from": "human", "value": right}]}]
    path.write_bytes(json.dumps(conversation, ensure_ascii=ascii_only).encode())
    if right:
        assert requests._sharegpt(path) == [(right, None)]


def test_what_is_no_text_is_named_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(b"In the \xff")
    for read in (files.read_text, lambda path: prompt(file=path), requests._prompt_file):
        with pytest.raises(InputError, match=r"text is not UTF-8 text \(at byte 7\)"):
            read(tmp_path / "text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"In the \xff"), encoding="latin-1"))
    with pytest.raises(InputError, match=r"stdin is not UTF-8 text \(at byte 7\)"):
        prompt()
    with pytest.raises(InputError, match="cannot be read"):
        files.read_text(tmp_path / "absent")
