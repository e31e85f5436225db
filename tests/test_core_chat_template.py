"""Chat templates that cannot write a conversation, told at convert, render and check. The judge is transformers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import hand_made
from conftest import SMALL_MODEL
from minitron.errors import EngineError
from minitron.model import chat_template, tokenizer_files
from minitron_triton.repository.check import check
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render

CHATML = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
REFUSAL = "a system message is needed"
TEMPLATES = {
    "plain": (CHATML, True),
    "tokens": ("{{ bos_token }}" + CHATML + "{{ eos_token }}", True),
    "marks": ("{% for one in messages %}{% generation %}{{ one.content }}{% endgeneration %}{% endfor %}", True),
    "loops": ("{% for one in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}", True),
    "json": ("{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ tools is none }}", True),
    "refuses": ("{% if messages[0].role != 'system' %}{{ raise_exception('" + REFUSAL + "') }}{% endif %}", True),
    "not closed": ("{% for one in messages %}{{ one.content }}", False),
    "no such tag": ("{% for one in messages %}{% speak %}{% endfor %}", False),
    "no such filter": ("{{ messages | shout }}", False),
    "no such name": ("{{ conversation[0].content }}", False),
    "no such method": ("{{ messages[0].content.shout() }}", False),
    "wrong type": ("{{ messages[0].content + 5 }}", False),
    "forbidden": ("{{ messages.append(1) }}", False),
}  # fmt: skip


def folder_with(folder: Path, template: str | bytes) -> Path:
    shutil.copytree(SMALL_MODEL, folder, copy_function=shutil.copyfile)
    (folder / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_broken_where_transformers_cannot_use_it(tmp_path: Path, name: str) -> None:
    template, is_fine = TEMPLATES[name]
    folder = folder_with(tmp_path / "model", template)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    works = True
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        works = "a system message is needed" in str(error)  # its own refusal
    found = chat_template.problem(tokenizer_files.read(folder))
    assert (found is None) is works is is_fine, found
    config = folder / "tokenizer_config.json"  # the same where it stands in the configuration
    (folder / "chat_template.jinja").unlink()
    for written in (template, [{"name": "other", "template": CHATML}, {"name": "default", "template": template}]):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": written}))
        again = chat_template.problem(tokenizer_files.read(folder))
        assert again == (None if found is None else ("tokenizer_config.json", found[1]))


def test_what_is_told_names_the_line(tmp_path: Path) -> None:
    files: dict[str, Any] = {"chat_template.jinja": b"one\ntwo\n{% if %}"}
    name, said = chat_template.problem(files) or ("", "")
    assert name == "chat_template.jinja" and said.startswith("line 3: ")
    assert chat_template.problem({"chat_template.jinja": b"\xff"}) == (name, "is no UTF-8 (at byte 0)")
    assert chat_template.problem({}) is None
    assert chat_template.problem({"tokenizer_config.json": b"{"}) is None  # which is another's to tell
    other = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{% if %}"}]
    found = chat_template.problem({"tokenizer_config.json": json.dumps({"chat_template": other}).encode()})
    assert found is not None and found[0] == "tokenizer_config.json"


def test_a_broken_template_is_told_before_it_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    render(engine, tmp_path / "fine", RepositoryOptions(), copy=True)
    broken = tmp_path / "fine" / "tokenizer" / "chat_template.jinja"
    broken.write_text("{% if %}")
    found = {(one.file, one.field): one.message for one in check(tmp_path / "fine") if one.is_error}
    assert "is broken: line 1" in found["tokenizer/chat_template.jinja", "chat_template"]
    shutil.copy(broken, engine / "tokenizer")
    with pytest.raises(EngineError, match=r"chat_template\.jinja: the chat template is broken: line 1.*take it out"):
        render(engine, tmp_path / "never", RepositoryOptions())
    assert not (tmp_path / "never").exists()
    with caplog.at_level(logging.WARNING):
        tokenizer_files.check(tokenizer_files.read(folder_with(tmp_path / "model", "{% if %}")), 1024, "here")
    assert "the chat template is broken: line 1" in caplog.text
