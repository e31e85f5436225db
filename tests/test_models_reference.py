"""transformers' own NemotronForCausalLM: the committed answers made anew, and what checkpoints mean (needs torch)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from answers import Answers, dtype_of
from conftest import DATA, SMALL_MODEL, minitron
from minitron.model import shape as model_shape
from minitron.model.precision import ROUNDED, Precision
from nemotron_reference import MUTATIONS, checkpoint_weights, rounded_weights, source_weights

pytestmark = pytest.mark.reference

GOLDEN_MODEL = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
SOURCES = {"golden a": GOLDEN_MODEL, "small": SMALL_MODEL}

#: Largest relative error of logits, ||checkpoint - source|| / ||source||.
LIMITS = {Precision.FLOAT16: 0.002, Precision.BFLOAT16: 0.015, Precision.INT8_WEIGHT_ONLY: 0.04}


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The functions of make_fixtures.py, which imports torch and transformers' model."""
    import torch

    import make_fixtures

    torch.set_num_threads(1)  # where tests share a machine, two threads wait for each other
    return make_fixtures


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    made: dict[tuple[str, Precision], Path] = {}

    def get(source: str, precision: Precision) -> Path:
        if (source, precision) not in made:
            output = tmp_path_factory.mktemp("checkpoint") / precision.value
            minitron("convert", SOURCES[source], "--output", output, "--precision", precision.value)
            made[source, precision] = output
        return made[source, precision]

    return get


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", ["small", "other"])
def test_the_committed_answers_come_out_again(
    name: str, precision: Precision, transformers: Any, answered_model: Callable[[str], Path]
) -> None:
    answers, folder = Answers.load(name), answered_model(name)
    shape = model_shape.read(folder / "config.json")
    weights = rounded_weights(source_weights(folder), precision, dtype_of(precision, name))
    built = transformers.transformers_model(shape, weights)
    expected = answers.variants[precision]
    assert np.abs(transformers.rows_of_logits(built, answers.prompts, answers.places) - expected.logits).max() < 1e-4
    assert [transformers.greedy(built, prompt)[0] for prompt in answers.prompts] == expected.continuations


@pytest.mark.parametrize("folder", [SMALL_MODEL, GOLDEN_MODEL], ids=["small", "golden a"])
def test_transformers_reads_the_same_shape_and_weights_from_the_folder(folder: Path, transformers: Any) -> None:
    """``from_pretrained`` on the folder, against the model that the other tests build from our reading of it."""
    from transformers import NemotronForCausalLM

    loaded = NemotronForCausalLM.from_pretrained(folder).float()
    built = transformers.transformers_model(model_shape.read(folder / "config.json"), source_weights(folder))
    ids = [5, 6, 7, 100, 101, 8, 9]
    assert np.array_equal(transformers.logits(loaded.eval(), ids), transformers.logits(built, ids))


def test_greedy_ids_are_those_of_generate(transformers: Any, answered_model: Callable[[str], Path]) -> None:
    import torch

    prompt = Answers.load("small").prompts[3]
    built = transformers.transformers_model(model_shape.read(SMALL_MODEL / "config.json"), source_weights(SMALL_MODEL))
    ids = torch.tensor([prompt])
    generated = built.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert generated[0, len(prompt) :].tolist() == transformers.greedy(built, prompt)[0]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_checkpoint_means_what_its_source_means(
    source: str, precision: Precision, transformers: Any, converted: Callable[[str, Precision], Path]
) -> None:
    shape = model_shape.read(SOURCES[source] / "config.json")
    weights = checkpoint_weights(converted(source, precision))
    assert _relative_error(transformers, source, shape, weights) < LIMITS[precision]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_wrong_checkpoint_is_noticed(
    source: str, precision: Precision, mutation: str, transformers: Any, converted: Callable[[str, Precision], Path]
) -> None:
    """The comparison above fails once the norm offset, the rotary share or the order of Q, K, V is wrong."""
    shape = model_shape.read(SOURCES[source] / "config.json")
    weights, shape = MUTATIONS[mutation](checkpoint_weights(converted(source, precision)), shape)
    assert _relative_error(transformers, source, shape, weights) > LIMITS[precision]


def _relative_error(transformers: Any, source: str, shape: model_shape.ModelShape, weights: Any) -> float:
    """Relative error of the logits of ``weights`` against the source model's, over prompts of 48 random ids."""
    folder = SOURCES[source]
    right = transformers.transformers_model(model_shape.read(folder / "config.json"), source_weights(folder))
    other = transformers.transformers_model(shape, weights)
    prompts = np.random.default_rng(0).integers(4, shape.vocab_size, (4, 48)).tolist()
    expected = np.concatenate([transformers.logits(right, ids) for ids in prompts])
    found = np.concatenate([transformers.logits(other, ids) for ids in prompts])
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(f"{source}: relative error of logits {error:.3%}")
    return error
