"""The screened head: the best word is the 16-bit head's, held against numpy's float64 and transformers' answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cpu_engines
from answers import Answers
from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import ov, process_core
from minitron.model.precision import Precision
from minitron_build.checkpoint.codes import dequantize, quantize
from minitron_build.engines.openvino import head
from minitron_build.engines.openvino import write as cpu
from minitron_build.evaluate.tasks.prefixes import PrefixEngine
from minitron_triton.models.tensorrt_llm import pipeline
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.engine_config import EngineConfig
from minitron_triton.models.tensorrt_llm.generation_request import Request

VOCAB, HIDDEN, COUNT = 4096, 96, 256
Rows = NDArray[np.float32]


def near_duplicates(random: np.random.Generator) -> Rows:
    """Sixteen noisy copies of each word: what tells them apart is smaller than a step of int8."""
    words = random.standard_normal((VOCAB // 16, HIDDEN)).repeat(16, axis=0)
    return (words + 0.004 * random.standard_normal(words.shape)).astype(np.float32)


def heavy_tails(random: np.random.Generator) -> Rows:
    return random.standard_t(3, (VOCAB, HIDDEN)).astype(np.float32)


def all_alike(random: np.random.Generator) -> Rows:
    """Every word could be the best one: more than the 16-bit rows of a step may be."""
    word = random.standard_normal((1, HIDDEN))
    return (word + 1e-5 * random.standard_normal((VOCAB, HIDDEN))).astype(np.float32)


class Head:
    """A graph of nothing but a head, in float32 on the CPU."""

    def __init__(self, weights: Rows, *, proven: bool = True) -> None:
        codes, scales = quantize(weights, 8)
        self.cheap = dequantize(codes, scales)
        hidden = op.parameter(ov.PartialShape([-1, -1, HIDDEN]), ov.Type.f32)
        screen = head.Screen(op.constant(self.cheap), head.rounding_errors(weights, self.cheap))
        logits, rows = head.screened(hidden, op.constant(weights), screen, proven=proven)
        model = ov.Model([op.result(logits)], [hidden, rows], "head")
        self._compiled = process_core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})

    def __call__(self, hidden: Rows, rows: list[int]) -> Rows:
        found: Rows = self._compiled([hidden[None], np.array(rows, np.int64)])[0]
        assert found.shape == (len(rows), 1, VOCAB)
        return found[:, 0]


def true_logits(hidden: Rows, weights: Rows) -> NDArray[np.float64]:
    return hidden.astype(np.float64) @ weights.astype(np.float64).T


@pytest.mark.parametrize("make", [near_duplicates, heavy_tails])
@pytest.mark.parametrize("rows_at_once", [1, 16])
def test_the_best_word_is_the_whole_head_s(make: Callable[..., Rows], rows_at_once: int) -> None:
    """And int8 alone gets some of them wrong: the screen has something to mend."""
    random = np.random.default_rng(7)
    weights = make(random)
    screened, hidden = Head(weights), random.standard_normal((COUNT, HIDDEN)).astype(np.float32)
    hidden[::2] = weights[random.integers(0, VOCAB, COUNT // 2)]  # states that point at a word, as a trained model's do
    truth = true_logits(hidden, weights)
    found = np.concatenate(
        [screened(hidden[i : i + rows_at_once], list(range(rows_at_once))) for i in range(0, COUNT, rows_at_once)]
    )
    best = truth.max(axis=1)
    chosen = truth[np.arange(COUNT), found.argmax(axis=1)]
    assert (best - chosen <= 1e-5 * np.abs(best)).all()  # float32 itself cannot tell closer ones apart
    np.testing.assert_allclose(found.max(axis=1), best, rtol=1e-5)
    alone = true_logits(hidden, screened.cheap).argmax(axis=1)
    assert (best - truth[np.arange(COUNT), alone] > 1e-5 * np.abs(best)).sum() >= 3


def test_every_word_s_true_logit_lies_in_its_interval() -> None:
    random = np.random.default_rng(8)
    weights = heavy_tails(random)
    codes, scales = quantize(weights, 8)
    cheap = dequantize(codes, scales)
    hidden = random.standard_normal((64, HIDDEN)).astype(np.float32)
    reach = np.linalg.norm(hidden.astype(np.float64), axis=1)[:, None] * head.rounding_errors(weights, cheap)
    off = np.abs(true_logits(hidden, weights) - true_logits(hidden, cheap))
    assert (off <= reach).all()
    assert (off > 0.2 * reach).any()  # and it is no wider than it has to be


def test_only_rows_asked_for_have_logits_and_there_may_be_none() -> None:
    """openvino_genai asks for none in a step that reads a prompt's middle."""
    random = np.random.default_rng(9)
    weights = heavy_tails(random)
    hidden = random.standard_normal((5, HIDDEN)).astype(np.float32)
    screened = Head(weights)
    np.testing.assert_array_equal(screened(hidden, [3, 1]), screened(hidden, [0, 1, 2, 3, 4])[[3, 1]])
    assert screened(hidden, []).size == 0


def test_where_all_words_could_be_the_best_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest get their true logits then, as many as the bound allows: 512 of 4,096 here for a row."""
    monkeypatch.setattr(head, "_MOST_ROWS", 512)
    random = np.random.default_rng(10)
    weights = all_alike(random)
    hidden = random.standard_normal((1, HIDDEN)).astype(np.float32)
    screened = Head(weights)
    truth, cheap = true_logits(hidden, weights), true_logits(hidden, screened.cheap)
    exact = np.abs(screened(hidden, [0]) - truth) < 0.01 * np.abs(cheap - truth)
    assert 500 <= exact.sum() <= 530


def test_without_the_proof_256_words_have_their_true_logits() -> None:
    random = np.random.default_rng(11)
    weights = heavy_tails(random)
    hidden = random.standard_normal((3, HIDDEN)).astype(np.float32)
    found, truth = Head(weights, proven=False)(hidden, [0, 1, 2]), true_logits(hidden, weights)
    for row, true in zip(found, truth, strict=True):
        likeliest = np.argsort(-row)[:200]
        np.testing.assert_allclose(row[likeliest], true[likeliest], rtol=1e-5)
    cheap = true_logits(hidden, Head(weights).cheap)
    assert (np.abs(found - cheap) > 1e-3).sum() <= 3 * head.CANDIDATES


# --- in an engine


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    made: dict[tuple[str, Precision], Path] = {}

    def engine(name: str, precision: Precision) -> Path:
        if (name, precision) not in made:
            made[name, precision] = tmp_path_factory.mktemp("head") / "engine"
            source = cpu_engines.checkpoint(name, precision)
            built = cpu.build(source, made[name, precision], cpu.CpuOptions(lm_head="screened"))
            assert built.details["lm_head"] == "screened"
        return made[name, precision]

    return engine


def generated(folder: Path, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log probs, four streams at a time."""
    engine = Engine.load(folder, kv_cache_tokens=8192)
    found = []
    try:
        for start in range(0, len(prompts), 4):
            callers = [cpu_engines.Caller(engine, Request(prompt, count)) for prompt in prompts[start : start + 4]]
            for caller in callers:
                assert caller.last().error is None
                found.append((caller.tokens, [p for chunk in caller.chunks for p in chunk.log_probs]))
    finally:
        engine.close()
    return found


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.INT4_WEIGHT_ONLY])
@pytest.mark.parametrize("name", cpu_engines.MODELS)
def test_greedy_tokens_are_transformers_own(
    engines: Callable[[str, Precision], Path], name: str, precision: Precision
) -> None:
    """Expected: transformers in float32 on the dequantised weights (tests/answers.py); log probs of the 16-bit head."""
    answers = Answers.load(name)
    expected = [list(one) for one in answers.variants[precision].continuations]
    prompts = [list(prompt) for prompt in answers.prompts]
    found = generated(engines(name, precision), prompts, len(expected[0]))
    assert [tokens for tokens, _ in found] == expected
    whole = generated(cpu_engines.engine(name, precision), prompts[:4], len(expected[0]))
    # "other" is random, so nearly all of its probability lies with words that keep approximate logits.
    for (_, screened), (_, as_is) in zip(found, whole, strict=False):
        np.testing.assert_allclose(screened, as_is, atol=1e-4 if name == "small" else 1e-3)


def test_prompts_are_scored_with_the_whole_head(engines: Callable[[str, Precision], Path]) -> None:
    """Every word counts there, so a screen's approximate ones will not do."""
    config = EngineConfig.read(engines("other", Precision.BFLOAT16))
    prompt = np.array(cpu_engines.PROMPTS[0], np.int64)
    found = pipeline.PlainModel(config).infer(prompt, 0)
    whole = pipeline.PlainModel(EngineConfig.read(cpu_engines.engine("other", Precision.BFLOAT16))).infer(prompt, 0)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_answers_of_tasks_are_scored_with_the_whole_head(engines: Callable[[str, Precision], Path]) -> None:
    found = []
    for folder in (engines("other", Precision.BFLOAT16), cpu_engines.engine("other", Precision.BFLOAT16)):
        engine = PrefixEngine(folder)
        engine.start(cpu_engines.PROMPTS[0])
        found += [logits for _, logits in engine.go_on([cpu_engines.PROMPTS[1]], 4)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_the_build_takes_it_where_execution_is_fast(tmp_path: Path) -> None:
    from minitron_cli.main import main

    checkpoint: Any = cpu_engines.checkpoint("other", Precision.BFLOAT16)
    import json

    for options, expected in (([], "as_is"), (["--execution", "fast"], "screened"), (["--head", "int8"], "int8")):
        folder = tmp_path / expected
        assert main(["build", str(checkpoint), "--target", "cpu", "--output", str(folder), *options]) == 0
        assert json.loads((folder / "config.json").read_text())["cpu"]["lm_head"] == expected
