"""Tokenizers: two sources for one fact, and inputs that were first opened by the server.

Right is what ``AutoTokenizer`` of transformers 5 gives, which is asked wherever it can read the files, and what
SentencePiece gives for its own models, trained here.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from conftest import DATA, SMALL_MODEL
from minitron.errors import EngineError, InputError
from minitron.model import tokenizer_files
from minitron_build.checkpoint.convert import convert
from minitron_build.sources.huggingface import read_tokenizer
from minitron_triton.repository.check import check

BEGIN, END = 2, 3
TEXT = "the sea"
IDS = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json")).encode(TEXT).ids


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the small Minitron."""
    return Path(shutil.copytree(SMALL_MODEL, tmp_path / "model", copy_function=shutil.copyfile))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# --- what is put around a text ------------------------------------------------------------------------------------


def template(*around: str) -> dict[str, Any]:
    """A post-processor of tokenizer.json; "A" stands for the text."""
    ids = {"<s>": BEGIN, "</s>": END}
    single = [{"Sequence": {"id": "A", "type_id": 0}} if one == "A" else {"SpecialToken": {"id": one, "type_id": 0}}
              for one in around]  # fmt: skip
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in around if name != "A"}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


@dataclass(frozen=True)
class Around:
    """tokenizer.json's post-processor, tokenizer_config.json's flags, the ids that are right, and what is said."""

    about: str
    source: str
    processor: Any
    flags: dict[str, Any]
    right: list[int]
    said: tuple[str, ...] = ()


AROUND = [
    Around("begin in the one, no end in the other", "transformers#46722", template("<s>", "A"),
           {"add_bos_token": None, "add_eos_token": False}, [BEGIN, *IDS]),
    Around("begin in the one, none in the other", "transformers#47988", template("<s>", "A"),
           {"add_bos_token": False, "add_eos_token": False}, [BEGIN, *IDS], ("add_bos_token false",)),
    Around("none in the one, begin in the other", "transformers#47988", None,
           {"add_bos_token": True, "add_eos_token": False}, IDS, ("add_bos_token true",)),
    Around("end in the one, begin in the other", "transformers#47988", template("A", "</s>"),
           {"add_bos_token": True, "add_eos_token": False}, [*IDS, END], ("add_bos_token true", "add_eos_token false")),
    Around("both say begin", "a Llama's files", template("<s>", "A"), {"add_bos_token": True, "add_eos_token": False},
           [BEGIN, *IDS]),
    Around("both say nothing", "the small Minitron", None, {"add_bos_token": False, "add_eos_token": False}, IDS),
    Around("no flags", "transformers 5's own files", template("<s>", "A", "</s>"),
           {"add_bos_token": None, "add_eos_token": None}, [BEGIN, *IDS, END]),
    Around("steps one after the other", "Llama 3's files",
           {"type": "Sequence", "processors": [
               {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
               template("<s>", "A")]},
           {"add_bos_token": False, "add_eos_token": None}, [BEGIN, *IDS], ("add_bos_token false",)),
    Around("BERT's way", "tokenizers", {"type": "BertProcessing", "sep": ["</s>", END], "cls": ["<s>", BEGIN]},
           {"add_bos_token": True, "add_eos_token": True}, [BEGIN, *IDS, END]),
    Around("bytes alone", "GPT-2's files",
           {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
           {"add_bos_token": False, "add_eos_token": None}, IDS),
]  # fmt: skip


@pytest.mark.parametrize("case", AROUND, ids=lambda case: case.about)
def test_tokenizer_json_decides_what_is_around_a_text(
    case: Around, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    edit(model / "tokenizer.json", lambda content: content.update(post_processor=case.processor))
    edit(model / "tokenizer_config.json", lambda content: content.update(case.flags))
    assert AutoTokenizer.from_pretrained(model).encode(TEXT) == case.right
    served = convert(model, tmp_path / "c").folder / "tokenizer"
    wanted = tokenizer_files.wants_special_tokens(served)
    assert _served_ids(served, wanted) == case.right
    assert len(caplog.messages) == len(case.said)
    for words, line in zip(case.said, caplog.messages, strict=True):
        assert words in line
        assert "tokenizer.json decides" in line


def _served_ids(folder: Path, add_special_tokens: bool) -> list[int]:
    """What the text model does with a prompt."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return list(tokenizer.encode(TEXT, add_special_tokens=add_special_tokens))


# --- a SentencePiece model alone ----------------------------------------------------------------------------------

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
#: What SentencePiece's trainer can be told that changes how a text is cut.
TRAINED: dict[str, dict[str, Any]] = {
    "as Minitron's": PLAIN | {"pad_id": 1, "unk_id": 0, "bos_id": 2, "eos_id": 3},
    "its own defaults: NFKC, no double spaces": {},
    "no double spaces": PLAIN | {"remove_extra_whitespaces": True},
    "NFKC": PLAIN | {"normalization_rule_name": "nfkc"},
    "no space before a text": PLAIN | {"add_dummy_prefix": False},
    "pieces of the user's": PLAIN | {"user_defined_symbols": ["<call>", "God", "\u2581the\u2581LORD"]},
    "special pieces": PLAIN | {"control_symbols": ["<turn>"]},
    "no begin": PLAIN | {"bos_id": -1, "eos_id": 1},
    "no bytes": PLAIN | {"byte_fallback": False},
}
TEXTS = (
    "In the beginning God created the heaven and the earth.", "  two  spaces at both ends  ", "tab\tnew\n\nline ", " ",
    "\ufb01ne \u00bd \u2460 \u3000wide", "e\u0301 \U0001f600 \u65e5\u672c", "a <call> God of the LORD", "Godthe LORDx",
    "def f():\n    return 1", "", "x" * 40,
)  # fmt: skip


@functools.cache
def _chapters() -> tuple[str, ...]:
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    return tuple(line for chapter in chapters[:12] for line in chapter.split("\n"))


def train(**settings: Any) -> bytes:
    """A SentencePiece model of a few hundred pieces."""
    written = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "minloglevel": 2} | settings
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(_chapters()), model_writer=written, num_threads=1, **settings)
    return written.getvalue()


@pytest.mark.parametrize("name", TRAINED)
def test_a_sentencepiece_model_alone_becomes_a_tokenizer_json(name: str, tmp_path: Path) -> None:
    """Its ids are SentencePiece's own; special pieces apart, which SentencePiece finds in no text."""
    raw = train(**TRAINED[name])
    (tmp_path / "tokenizer.model").write_bytes(raw)
    judge = sentencepiece.SentencePieceProcessor()
    judge.LoadFromSerializedProto(raw)
    made = read_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_str(made["tokenizer.json"].decode())
    for text in (*TEXTS, *_chapters()[:40]):
        assert tokenizer.encode(text).ids == judge.EncodeAsIds(text), text
    config = json.loads(made["tokenizer_config.json"])
    for key, token in (("bos_token", judge.bos_id()), ("eos_token", judge.eos_id()), ("pad_token", judge.pad_id())):
        assert config.get(key) == (judge.IdToPiece(token) if token >= 0 else None)


def _without_tokenizer_json(model: Path, **config: Any) -> None:
    (model / "tokenizer.json").unlink()
    (model / "special_tokens_map.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "right"),
    [  # transformers 5.24 with sentencepiece 0.2.3 and protobuf 7.36, asked by hand
        ({}, IDS),
        ({"add_bos_token": True, "bos_token": "<s>"}, [BEGIN, *IDS]),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, [BEGIN, *IDS]),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}, IDS),
        ({"add_bos_token": True, "add_eos_token": True}, [BEGIN, *IDS, END]),
    ],
)
def test_the_flags_decide_where_there_is_no_tokenizer_json(
    config: dict[str, Any], right: list[int], model: Path, tmp_path: Path
) -> None:
    """transformers#36291: convert, build and render were fine, and the server asked for ``tiktoken``."""
    _without_tokenizer_json(model, **config)
    served = convert(model, tmp_path / "c").folder / "tokenizer"
    assert _served_ids(served, tokenizer_files.wants_special_tokens(served)) == right


def test_added_tokens_and_the_chat_template_come_along(model: Path) -> None:
    extra = {"content": "<turn>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    _without_tokenizer_json(model, added_tokens_decoder={"1024": extra}, chat_template="{{ messages }}")
    (model / "added_tokens.json").write_text('{"<call>": 1025}')
    made = read_tokenizer(model)
    tokenizer = Tokenizer.from_str(made["tokenizer.json"].decode())
    assert tokenizer.encode("<turn>the<call>").ids == [1024, *tokenizer.encode("the").ids, 1025]
    assert (tokenizer.decode([1024]), tokenizer.decode([1025])) == ("", "<call>")
    assert json.loads(made["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


# --- opened where it comes in -------------------------------------------------------------------------------------


def _gone(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def _written(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _alone(content: Callable[[], bytes]) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer.model").write_bytes(content())

    return change


def _added(token: int) -> Callable[[Path], object]:
    entry = {"id": token, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    return lambda model: edit(model / "tokenizer.json", lambda content: content["added_tokens"].append(entry))


#: (what, who, change of the folder, words of the refusal)
BROKEN: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("a unigram model alone", "transformers#36291", _alone(lambda: train(model_type="unigram", vocab_size=400)),
     "'unigram'"),
    ("a tiktoken file under SentencePiece's name", "transformers#36291", _alone(lambda: b"IQ== 0\nIg== 1\n"),
     "package transformers"),
    ("a Git LFS pointer", "every clone without git-lfs", _alone(lambda: b"version https://git-lfs.github.com/spec/v1\n"),
     "no SentencePiece model"),
    ("a model cut short", "an interrupted download",
     _alone(lambda: (SMALL_MODEL / "tokenizer.model").read_bytes()[:5000]), "no SentencePiece model"),
    ("vocab.json and merges.txt alone", "transformers 5 reads no such Nemotron",
     lambda model: [_gone("tokenizer.json")(model), _gone("tokenizer.model")(model),
                    _written("vocab.json", "{}")(model)], "vocab.json without tokenizer.json"),
    ("a tokenizer.json cut short", "an interrupted download", _written("tokenizer.json", '{"model": {"type'),
     "tokenizer.json cannot be read"),
    ("a tokenizer.json of a newer package", "files of a newer tokenizers",
     lambda model: edit(model / "tokenizer.json", lambda c: c.update(normalizer={"type": "NotYet"})),
     "tokenizer.json cannot be opened"),
    ("a tokenizer_config.json that is no object", "hand-edited", _written("tokenizer_config.json", "[]"),
     "tokenizer_config.json holds no JSON object"),
    ("a generation_config.json cut short", "an interrupted download", _written("generation_config.json", "{"),
     "generation_config.json cannot be read"),
    ("an end that is no number", "hand-edited", _written("generation_config.json", '{"eos_token_id": "</s>"}'),
     "eos_token_id is '</s>'"),
    ("more tokens than the model has", "a tokenizer of another model", _added(1024), "another model"),
    ("an added token that the package renumbers", "tokenizers", _added(1030), "another model"),
    ("a special token that the vocabulary lacks", "transformers adds it as token 1024, which the model does not know",
     lambda model: edit(model / "tokenizer_config.json", lambda content: content.update(pad_token="<new>")),
     r"'<new>' \(pad_token\).* token 1024, and the model knows 1024"),
    ("another one", "the same", lambda model: edit(model / "tokenizer_config.json", lambda content: content.update(
        extra_special_tokens=["<s>", {"content": "<new>"}])), r"'<new>' \(extra_special_tokens\)"),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case[0])
def test_what_cannot_be_served_is_refused_at_convert(case: Any, model: Path, tmp_path: Path) -> None:
    _, _, change, words = case
    change(model)
    with pytest.raises(InputError, match=words) as refused:
        convert(model, tmp_path / "c")
    assert "\n" not in str(refused.value)


def test_an_added_token_that_the_package_renumbers_is_refused(tmp_path: Path) -> None:
    """The package tokenizers gives an added token the next free id, whatever its file says."""
    added = {"id": 7, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}  # fmt: skip
    raw = json.dumps({"added_tokens": [added], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    assert Tokenizer.from_str(raw).token_to_id("<x>") == 1
    with pytest.raises(InputError, match="'<x>' as token 7, and the package tokenizers makes it 1"):
        tokenizer_files.check({"tokenizer.json": raw.encode()}, 100, "here")


@pytest.mark.parametrize(
    "case",
    [
        ({"eos_token_id": 3, "pad_token_id": -1}, {"eos_token_id": 3}, "pad_token_id -1"),
        ({"eos_token_id": [3, 4096], "temperature": 0.5}, {"eos_token_id": [3], "temperature": 0.5}, "4096"),
        ({"eos_token_id": [3, 977]}, {"eos_token_id": [3, 977]}, ""),
    ],
)
def test_ids_that_no_token_has_are_left_out(
    case: Any, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does, which says that such an id is not valid and may be ignored."""
    ids, kept, said = case
    (model / "generation_config.json").write_text(json.dumps(ids))
    folder = convert(model, tmp_path / "c").folder
    assert json.loads((folder / "tokenizer" / "generation_config.json").read_text()) == kept
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, {"bos_token_id": 2, "eos_token_id": 3}),
        ({"eos_token_id": [3, 977]}, {"bos_token_id": 2, "eos_token_id": [3, 977]}),
        ({"bos_token_id": ..., "eos_token_id": ...}, {}),  # then the tokenizer's own end, as in vLLM
        ({"eos_token_id": None, "pad_token_id": 1}, {"bos_token_id": 2, "pad_token_id": 1}),
    ],
)
def test_ids_of_config_json_where_there_is_no_generation_config(
    changes: dict[str, Any], ids: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """What transformers' from_pretrained gives a model there: GenerationConfig, read from config.json."""
    (model / "generation_config.json").unlink()
    edit(model / "config.json", lambda content: [content.pop(key) if value is ... else content.update({key: value})
                                                 for key, value in changes.items()])  # fmt: skip
    folder = convert(model, tmp_path / "c").folder
    found = json.loads((folder / "tokenizer" / "generation_config.json").read_text())
    assert found == ids
    from transformers import GenerationConfig

    judge = GenerationConfig.from_pretrained(model, config_file_name="config.json")
    assert {key: getattr(judge, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        key: found.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def test_repo_check_opens_the_tokenizer(small_repository: Callable[[str], Path], tmp_path: Path) -> None:
    repository = Path(shutil.copytree(small_repository("float16"), tmp_path / "r"))
    assert not [finding for finding in check(repository) if finding.is_error]
    edit(repository / "tokenizer" / "tokenizer.json", lambda content: content.update(decoder={"type": "NotYet"}))
    assert any("cannot be opened" in finding.message for finding in check(repository))
    (repository / "tokenizer" / "tokenizer.json").unlink()
    assert any("tokenizer.model without tokenizer.json" in finding.message for finding in check(repository))


def test_render_takes_no_engine_that_has_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """An engine folder of before, from when convert let such a model through."""
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(EngineError, match=r"tokenizer\.model without tokenizer\.json"):
        tokenizer_files.present(tmp_path)
