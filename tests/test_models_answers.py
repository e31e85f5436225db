"""Checkpoints mean what transformers computes: tensors, logits and first tokens, held without torch.

The expected logits are transformers' own (data/answers). Here the weights come out of real checkpoints, through the
toolkit's converter and reader, and the arithmetic is the numpy Nemotron of ``nemotron_reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from answers import Answers, dtype_of, sha256_of_weights
from conftest import minitron
from minitron.model import shape as model_shape
from minitron.model.precision import ROUNDED, Precision
from nemotron_reference import (
    MUTATIONS,
    Array,
    Weights,
    checkpoint_weights,
    logits,
    rounded_weights,
    source_weights,
)

MODELS = ("small", "other")
LOGIT_ERROR = 1e-3


@pytest.fixture(scope="module")
def checkpoint(
    answered_model: Callable[[str], Path],
    small_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Precision], Path]:
    made: dict[Precision, Path] = {}

    def get(name: str, precision: Precision) -> Path:
        if name == "small":
            return small_checkpoint(precision.value)
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("checkpoint") / precision.value
            minitron("convert", answered_model(name), "--output", made[precision], "--precision", precision.value)
        return made[precision]

    return get


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_read_back_is_the_source_rounded_as_the_contract_says(
    name: str, precision: Precision, answered_model: Callable[[str], Path], checkpoint: Callable[[str, Precision], Path]
) -> None:
    """Bit for bit, every tensor; the expected values are worked out from the source, not by the converter."""
    expected = rounded_weights(source_weights(answered_model(name)), precision, dtype_of(precision, name))
    found = checkpoint_weights(checkpoint(name, precision))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_logits_on_a_checkpoint_equal_those_of_transformers(
    name: str, precision: Precision, answered_model: Callable[[str], Path], checkpoint: Callable[[str, Precision], Path]
) -> None:
    answers = Answers.load(name)
    shape = model_shape.read(answered_model(name) / "config.json")
    found = rows_of_logits(checkpoint_weights(checkpoint(name, precision)), shape, answers)
    assert np.abs(found - answers.variants[precision].logits).max() < LOGIT_ERROR
    ends = [row for row, (i, position) in enumerate(answers.places) if position == len(answers.prompts[i]) - 1]
    firsts = [answers.variants[precision].continuations[answers.places[row][0]][0] for row in ends]
    assert found[ends].argmax(axis=1).tolist() == firsts


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_checkpoint_is_noticed(
    name: str, mutation: str, answered_model: Callable[[str], Path], checkpoint: Callable[[str, Precision], Path]
) -> None:
    """The comparison above fails by far once the norm offset, the rotary share or the order of Q, K, V is wrong."""
    answers = Answers.load(name)
    shape = model_shape.read(answered_model(name) / "config.json")
    weights, shape = MUTATIONS[mutation](checkpoint_weights(checkpoint(name, Precision.BFLOAT16)), shape)
    found = rows_of_logits(weights, shape, answers)
    assert np.abs(found - answers.variants[Precision.BFLOAT16].logits).max() > 100 * LOGIT_ERROR


def test_answers_are_complete_and_about_the_models_of_today(answered_model: Callable[[str], Path]) -> None:
    for name in MODELS:
        answers = Answers.load(name)
        assert answers.model_sha256 == sha256_of_weights(answered_model(name))
        assert len(answers.prompts) == 20
        assert set(answers.variants) == set(ROUNDED)
        for variant in answers.variants.values():
            assert [len(ids) for ids in variant.continuations] == [64] * 20


def rows_of_logits(weights: Weights, shape: model_shape.ModelShape, answers: Answers) -> Array:
    """Logits at the places that the answers keep."""
    whole = {i: logits(weights, shape, np.array(answers.prompts[i])) for i, _ in answers.places}
    return np.stack([whole[i][position] for i, position in answers.places])
