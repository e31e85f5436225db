"""One set of end ids: what a model's folder says (transformers' tokenizer is the source), and how the engine ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hand_made
from cpu_engines import EXPECTED, PROMPTS, Caller, greedy, run
from minitron.errors import EngineError
from minitron.text import end_ids
from minitron.text.tokenizer import TextTokenizer
from minitron_triton.models.tensorrt_llm import request_tensors
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation_request import Request
from minitron_triton.models.tensorrt_llm.parameters import Parameters
from minitron_triton.repository.check import check
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
EOS = {"content": "</s>", "__type": "AddedToken"}
DECODER = {"added_tokens_decoder": {"3": {"content": "</s>", "special": True}}}


def tokenizer(folder: Path, **files: Mapping[str, Any] | None) -> Path:
    """A tokenizer folder (eos </s> is 3) with other content in some of its files; None takes one away."""
    hand_made.sentencepiece_tokenizer(folder)
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.unlink() if content is None else path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (3,)),
        ({"generation_config": {"eos_token_id": [9, 7]}}, (9, 7)),
        ({"generation_config": {"eos_token_id": []}}, ()),
        ({"generation_config": {"eos_token_id": None}}, (3,)),
        ({"generation_config": None}, (3,)),
        ({"generation_config": None, "tokenizer_config": FAST | DECODER | {"eos_token": EOS}}, (3,)),
        ({"generation_config": None, "tokenizer_config": FAST | {"eos_token": "▁fox"}, "special_tokens_map": {}},
         (348,)),
        ({"generation_config": None, "tokenizer_config": FAST, "special_tokens_map": {"eos_token": "</s>"}}, (3,)),
        ({"generation_config": None, "tokenizer_config": FAST | {"eos_token": "</s>"},
          "special_tokens_map": {"eos_token": "<unk>"}}, (0,)),
        ({"generation_config": None, "tokenizer_config": FAST | DECODER, "special_tokens_map": {"eos_token": "</s>"}},
         ()),
        ({"generation_config": None, "tokenizer_config": FAST, "special_tokens_map": {}}, ()),
    ],
)  # fmt: skip
def test_a_folder_s_end_ids_are_those_that_transformers_finds(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """The text code loads the tokenizer with transformers; the engine's process reads JSON alone."""
    folder = tokenizer(tmp_path / "tokenizer", **files)
    assert end_ids.of_model(folder) == TextTokenizer(str(folder)).end_ids == expected


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "3"}', '{"eos_token_id": [3, true]}', '{"eos_token_id": -1}', "[]"]
)
def test_an_unusable_end_is_refused_when_the_repository_is_rendered_and_checked(tmp_path: Path, content: str) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    render(engine, tmp_path / "repository", RepositoryOptions())
    for folder in (engine, tmp_path / "repository"):
        (folder / "tokenizer" / "generation_config.json").write_text(content)
    with pytest.raises(EngineError, match=r"generation_config\.json"):
        render(engine, tmp_path / "other", RepositoryOptions())
    assert ("tokenizer/generation_config.json", "eos_token_id") in {
        (finding.file, finding.field) for finding in check(tmp_path / "repository")
    }


def test_an_end_id_that_the_engine_cannot_make_is_of_another_model(tmp_path: Path) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    (engine / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [3, 5000]}')
    with pytest.raises(EngineError, match="ends texts with id 5000, and the engine knows 357"):
        render(engine, tmp_path / "repository", RepositoryOptions())


@pytest.mark.parametrize(
    ("given", "meant"), [(977, {3, 977}), (3, {3, 977}), (5, {5}), (-1, set()), (None, set()), (-7, set())]
)
def test_one_of_the_model_s_own_stands_for_all_and_another_for_itself(given: int | None, meant: set[int]) -> None:
    tensors = {"input_ids": np.array([[5]]), "request_output_len": np.array([4])}
    if given is not None:
        tensors["end_id"] = np.array([given])
    wanted = request_tensors.read(tensors, decoupled=True, exclude_input=True, own_end_ids=(3, 977))
    assert wanted.rows[0][0].end_ids == meant


def test_the_model_reads_its_ends_where_its_config_names_the_tokenizer(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tokenizer", generation_config={"eos_token_id": [9, 7]})
    values = {"gpt_model_path": str(tmp_path), "tokenizer_dir": str(folder), "max_queue_size": "5"}

    def read(values: dict[str, str]) -> Parameters:
        return Parameters.of({"parameters": {key: {"string_value": value} for key, value in values.items()}})

    assert (read(values).end_ids, read(values).max_queue) == ((9, 7), 5)
    assert [read(values | more).prompt_lookup for more in ({}, {"speculation": "none"})] == [False, False]
    assert read(values | {"speculation": "prompt_lookup"}).prompt_lookup
    assert (read(values | {"tokenizer_dir": ""}).end_ids, read({"gpt_model_path": "/"}).max_queue) == ((), 0)


@pytest.mark.parametrize("first", [7, 10])
def test_whichever_end_comes_first_ends_and_none_is_output(engine: Engine, first: int) -> None:
    """The tokens at two places of transformers' continuation; the later one is never reached."""
    expected = EXPECTED[0]
    ends = frozenset({expected[first], expected[first + 2]})
    caller = Caller(engine, Request(PROMPTS[0], 64, end_ids=ends))
    assert caller.last().finish == "end_id"
    cut = min(expected.index(end) for end in ends)
    assert caller.tokens == expected[:cut]


def test_min_tokens_holds_back_every_end(engine: Engine) -> None:
    """The best and the second best first tokens of transformers' model end; neither comes before the fourth token."""
    ends: list[int] = []

    def ban(row: Any, found: list[int]) -> None:
        if len(found) < 3:
            row[ends] = -np.inf

    for _ in range(2):
        ends += greedy(PROMPTS[0], 1, ban)
    assert len(set(ends)) == 2
    expected = greedy(PROMPTS[0], 8, ban)
    cut = next((place for place, token in enumerate(expected) if token in ends), 8)
    assert run(engine, Request(PROMPTS[0], 8, end_ids=frozenset(ends), min_tokens=3))[0] == expected[:cut]
    assert run(engine, Request(PROMPTS[0], 8, end_ids=frozenset(ends)))[0] == []
