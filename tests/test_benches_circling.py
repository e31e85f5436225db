"""The model of ``make bench-cpu`` whose text is known, judged by Nemotron in plain numpy (nemotron_reference)."""

from __future__ import annotations

from pathlib import Path

import circling_model
import numpy as np
import pytest
from circling_model import Rings
from cpu_workload import ALL_FILLERS, WORDS
from tokenizers import Tokenizer

from conftest import SMALL_MODEL
from minitron.model import shape as model_shape
from minitron.model.precision import Precision
from nemotron_reference import logits, rounded_weights, source_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return circling_model.write(tmp_path_factory.mktemp("circling") / "model", "tiny", ALL_FILLERS)


@pytest.mark.parametrize("precision", [None, Precision.INT4_WEIGHT_ONLY])
def test_each_token_is_followed_by_its_successor(model: Path, precision: Precision | None) -> None:
    """In four bits too: the best logit leads by far."""
    weights = source_weights(model)
    if precision:
        weights = rounded_weights(weights, precision, "bfloat16")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    follows = Rings(tokenizer, ALL_FILLERS).successors(2048)
    ids = np.random.default_rng(0).permutation(2048)[:200]
    found = logits(weights, model_shape.read(model / "config.json"), ids)
    first, second = np.sort(found, axis=1)[:, :-3:-1].T
    assert (found.argmax(axis=1) == follows[ids]).all()
    assert (first > 1.5 * second).all()


def test_a_prompt_is_gone_round_with_some_words_changed() -> None:
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    rings = Rings(tokenizer, ALL_FILLERS)
    follows = rings.successors(1024)
    ids = tokenizer.encode(rings.prompt(5, "1 r"), add_special_tokens=False).ids[-100:]
    changed = [place for place in range(1, 100) if follows[ids[place - 1]] != ids[place]]
    # Every sixteenth of 96 words is another, so that the step to it and the step from it are not the model's.
    assert changed == [place for word in range(15, 96, 16) for place in (word, word + 1)]
    assert ids[96:] == ids[:4]
    assert not set(ids) & set(tokenizer.encode(" ".join(WORDS)).ids)


def test_every_token_has_one_predecessor_and_the_circle_is_apart() -> None:
    rings = Rings(Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json")), ALL_FILLERS)
    follows = rings.successors(1024)
    assert sorted(follows) == list(range(1024))
    once_around, token = [], rings.circle[0]
    while token not in once_around:
        once_around.append(token)
        token = int(follows[token])
    assert once_around == rings.circle and len(once_around) == 96
