"""Metrics, percentiles and intervals, prompts of exact length, and comparisons.

Expected values: worked out by hand in each test, numpy's own nearest-rank method, and the tokenizer itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.errors import InputError
from minitron_client.bench import compare
from minitron_client.bench.grid import BenchPoint, BenchPointResult
from minitron_client.bench.record import Record
from minitron_client.bench.requests import SyntheticPrompts, tokenizer_count
from minitron_client.bench.statistics import PERCENTILES, Estimate, enough, mean, percentile, percentiles, remark, shown
from minitron_client.client.timing import Timing


def test_metrics_of_a_stream() -> None:
    # Sent at 100; an empty response at 150, then 1, 2 and 3 tokens at 200, 260, 350, and the empty last one at 370.
    timing = Timing(100, [(150, 0), (200, 1), (260, 2), (350, 3), (370, 0)])
    assert timing.ttft_ns == 100  # 200 - 100: the first response with a token
    assert timing.itl_ns == [30, 30]  # (260 - 200) / 2 and (350 - 260) / 3
    assert timing.tpot_ns == 30  # (350 - 200) / (6 - 1)
    assert timing.e2e_ns == 270  # 370 - 100: the last response
    assert timing.output_tokens == 6


def test_metrics_that_cannot_be_computed_are_absent() -> None:
    one = Timing(0, [(5, 1)])
    assert (one.ttft_ns, one.tpot_ns, one.itl_ns) == (5, None, [])
    uncounted = Timing(0, [(5, 1), (6, None)])
    assert (uncounted.ttft_ns, uncounted.tpot_ns, uncounted.itl_ns, uncounted.output_tokens) == (None, None, [], None)
    assert uncounted.e2e_ns == 6
    nothing = Timing(0, [])
    assert (nothing.e2e_ns, nothing.output_tokens) == (None, None)


def test_late_sends_show_in_the_intended_times() -> None:
    record = Record(0, intended_ns=100, sent_ns=900, responses=[(1000, 1)])
    assert record.lateness_ns == 800
    assert record.timing.ttft_ns == 100 and record.intended_timing.ttft_ns == 900
    assert Record.of_line(record.line()) == record


@pytest.mark.parametrize("share", [1, 50, 90, 99, 100])
@pytest.mark.parametrize("size", [1, 2, 10, 99, 100, 101])
def test_percentile_is_the_nearest_rank(share: int, size: int) -> None:
    values = np.random.default_rng(size).exponential(size=size)
    assert percentile(values, share) == np.percentile(values, share, method="inverted_cdf")


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(7)
    truth = np.log(2)  # median of the exponential distribution
    hits = 0
    for trial in range(100):
        repeats = [draw.exponential(size=60).tolist() for _ in range(5)]
        found = percentiles(repeats, seed=trial)[50]
        assert found and found.low is not None and found.high is not None and found.low <= found.value <= found.high
        hits += found.low <= truth <= found.high
    assert 85 <= hits <= 100


@pytest.mark.parametrize(("share", "fewest"), [(50, 2), (90, 10), (95, 20), (99, 100)])
def test_a_percentile_of_too_few_values_is_absent(share: int, fewest: int) -> None:
    """One value at least lies beyond it: ceil(1 / (1 - q)), by hand."""
    assert not enough(share, fewest - 1) and enough(share, fewest)
    if share in PERCENTILES:
        assert percentiles([[1.0] * (fewest - 1)])[share] is None
        assert percentiles([[1.0] * (fewest // 2)] * 2)[share] == Estimate(1.0, 1.0, 1.0)


def test_what_is_absent_is_a_dash_that_is_explained_once() -> None:
    assert (shown(1.236), shown(None)) == ("1.24", "-")
    (said,) = remark([["a", "1.24", "-"], ["b", "-", "-"]])
    assert "a p99 100" in said and remark([["a", "1.24"]]) == []


def test_one_repeat_gives_no_interval_and_none_no_value() -> None:
    assert percentiles([[3.0, 1.0, 2.0]])[50] == Estimate(2.0, None, None)
    assert percentiles([[], []]) == {}
    assert mean([5.0]) == Estimate(5.0, None, None) and mean([]) is None


def test_students_interval() -> None:
    # 10, 12, 14: mean 12, deviation 2; t(0.975, 2) = 4.303; half = 4.303 * 2 / sqrt(3) = 4.9687
    found = mean([10.0, 12.0, 14.0])
    assert found is not None and found.low is not None and found.high is not None
    assert (found.value, round(found.low, 3), round(found.high, 3)) == (12.0, 7.031, 16.969)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 500])
def test_prompts_have_exactly_the_asked_length(small_model: Path, tokens: int) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    maker = SyntheticPrompts(tokenizer_count(small_model), seed=3)
    made = [maker.make(tokens, index) for index in range(5)]
    assert [len(tokenizer.encode(text).ids) for text in made] == [tokens] * 5
    again = SyntheticPrompts(tokenizer_count(small_model), seed=3)
    assert [again.make(tokens, index) for index in range(5)] == made
    assert tokens == 1 or len(set(made)) == 5


def test_a_length_that_no_prompt_has_is_said() -> None:
    with pytest.raises(InputError, match="no prompt of 5 tokens"):
        SyntheticPrompts(lambda text: 2 * len(text.split())).make(5)
    with pytest.raises(InputError, match="tokenizer"):
        tokenizer_count(Path("nowhere"))


def result(tpot: float, rate: float, spread: float = 0.01) -> BenchPointResult:
    def around(value: float) -> Estimate:
        return Estimate(value, value * (1 - spread), value * (1 + spread))

    return BenchPointResult(
        BenchPoint(8, 8, 1), 4, {}, (8, 8), {"tpot_ms": {50: around(tpot)}}, {"tpot_ms": 4}, around(rate)
    )


def stored(one: BenchPointResult) -> dict[str, Any]:
    return json.loads(json.dumps({"points": [one.document()]}))  # type: ignore[no-any-return]


def test_baseline_verdict() -> None:
    before = stored(result(10, 100))
    assert compare.regressions([result(10.5, 96)], before, 0.1) == []
    assert compare.regressions([result(5, 200)], before, 0.1) == []
    worse = compare.regressions([result(12, 80)], before, 0.1)
    assert worse == ["8:8:1 tpot_ms p50 was 10 and is 12", "8:8:1 tokens/s was 100 and is 80"]
    assert compare.regressions([result(12, 80, spread=0.5)], before, 0.1) == []  # the intervals overlap
    assert compare.regressions([], before, 0.1) == ["8:8:1 was not measured"]
    assert compare.speedups([result(1, 150)], before) == {BenchPoint(8, 8, 1): 1.5}


def test_roofline_comes_from_the_manifest(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    plan = {"precision": "int8_weight_only", "roofline": {"single_tokens_per_s": {"int8_weight_only": 487.0}}}
    (engine / "manifest.json").write_text(json.dumps({"details": {"plan": plan}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"details": {}}))
    for folder in (engine, tmp_path, engine / "manifest.json"):
        found = compare.read_roofline(folder)
        assert found and found.tokens_per_s(4) == 4 * 487.0
    (engine / "manifest.json").write_text(json.dumps({"details": {"plan": {"roofline": None}}}))
    assert compare.read_roofline(engine) is None
    (engine / "manifest.json").write_text("broken")
    with pytest.raises(InputError, match="manifest"):
        compare.read_roofline(engine)
