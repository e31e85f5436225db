"""The gate of ``minitron eval --baseline``. The judges: Newcombe's published examples, sums by hand, and how often an
interval holds the truth, counted over all outcomes that there can be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.errors import InputError, UsageError
from minitron_build.evaluate.tasks import gate, statistics
from minitron_build.evaluate.tasks.gate import CARD, judge, read_baseline, worst
from minitron_build.evaluate.tasks.suites import SuiteTask, suite


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_wilson_s_interval(right: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    found = statistics.share(right, count)
    assert [found.low, found.high] == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_shares_of_other_questions_have_newcombe_s_interval(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10."""
    found = statistics.difference_of_shares(statistics.share(*first), statistics.share(*second))
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(("gained", "lost", "count"), [(0.02, 0.02, 60), (0.1, 0.05, 40), (0.01, 0.2, 60)])
def test_shares_of_the_same_questions_are_held_about_as_often_as_promised(
    gained: float, lost: float, count: int
) -> None:
    """Over all outcomes of a trinomial distribution: the truth lies in 95 % of the intervals, but for a point."""
    held = 0.0
    for a in range(count + 1):
        for b in range(count + 1 - a):
            logs = [math.lgamma(n + 1) for n in (count, a, b, count - a - b)]
            chance = logs[0] - sum(logs[1:]) + a * math.log(gained) + b * math.log(lost)
            chance += (count - a - b) * math.log(1 - gained - lost)
            if chance < -30:
                continue
            found = statistics.difference_of_paired_shares(a, b, count)
            held += math.exp(chance) * (found.low <= gained - lost <= found.high)
    assert 0.94 < held < 1


def test_shares_of_the_same_questions_by_hand() -> None:
    """98 equal answers count as 100 with one gained and one lost: the half is Z times the root of 0.02 / 100."""
    found = statistics.difference_of_paired_shares(0, 0, 98)
    assert [found.low, found.high] == pytest.approx([-1.959964 * math.sqrt(0.02 / 100), 1.959964 * math.sqrt(0.0002)])


def test_mcnemar_by_hand() -> None:
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert statistics.mcnemar(4, 4) == 1
    assert statistics.mcnemar(0, 0) == 1


def test_a_bootstrap_of_means_is_as_wide_as_their_standard_error_says() -> None:
    pick = np.random.default_rng(5)
    first, second = pick.normal(0.3, 0.1, 500), pick.normal(0.28, 0.1, 500)
    found, differences = statistics.difference_of_paired_values(first, second), first - second
    half = 1.96 * differences.std(ddof=1) / math.sqrt(500)
    assert found.value == pytest.approx(differences.mean())
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.1 * half)


def task(scores: list[float], **more: Any) -> dict[str, Any]:
    """What a run says of a task whose questions were worth so much."""
    mean = float(np.mean(scores))
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores)))
    return {"metric": "acc", "shots": 0, "count": len(scores), "value": mean, "standard_error": error,
            "questions": {f"q{number}": score for number, score in enumerate(scores)}} | more  # fmt: skip


BASE = [1.0] * 300 + [0.0] * 200


def changed(lost: int, gained: int) -> list[float]:
    return [0.0] * lost + BASE[lost : 500 - gained] + [1.0] * gained


def verdict(scores: list[float], base: list[float], tolerance: float, **more: Any) -> gate.Verdict:
    (found,) = judge({"t": task(scores, **more)}, {"t": task(base, **more)}, tolerance)
    return found


def test_the_three_verdicts() -> None:
    same = verdict(BASE, BASE, 0.02)
    assert same.outcome == gate.PASS and same.difference is not None and same.difference.value == 0
    assert verdict(changed(60, 5), BASE, 0.02).outcome == gate.FAIL
    few = verdict(changed(10, 5), BASE, 0.02)
    assert few.outcome == gate.UNDECIDED and few.count == 500
    assert few.needed is not None and few.needed > 500
    # With so many questions and the same shares the verdict is there.
    times = math.ceil(few.needed / 500)
    assert verdict(changed(10, 5) * times, BASE * times, 0.02).outcome == gate.PASS
    worse = verdict(changed(14, 0), BASE, 0.025)  # for certain worse, but not for certain by more than that
    assert worse.outcome == gate.UNDECIDED and worse.difference is not None and worse.difference.high < 0
    assert verdict(BASE[:5], BASE[:5], 0.01).outcome == gate.UNDECIDED  # five equal answers say little
    assert verdict(changed(10, 0), BASE, 0.02).needed is None  # it is worse by just the tolerance


def test_pairs_decide_where_the_same_answers_unpaired_do_not() -> None:
    ours = task(changed(8, 6))
    other = {"t": task(BASE) | {"questions": {f"other{n}": score for n, score in enumerate(BASE)}}}
    assert judge({"t": ours}, {"t": task(BASE)}, 0.03)[0].outcome == gate.PASS
    unpaired = judge({"t": ours}, other, 0.03)[0]
    assert unpaired.outcome == gate.UNDECIDED and unpaired.method == "not paired"


def test_fewer_questions_of_the_same_are_compared_with_themselves() -> None:
    ours = task(BASE[250:350])
    (found,) = judge({"t": ours}, {"t": task(BASE) | {"value": 0.6}}, 0.5)
    ours_keys = {f"q{n}": score for n, score in enumerate(BASE[250:350])}
    assert ours["questions"] == ours_keys
    assert found.baseline == pytest.approx(np.mean(BASE[:100]))


def test_values_that_are_no_yes_or_no_are_bootstrapped_and_a_handful_says_nothing() -> None:
    pick = np.random.default_rng(1)
    base = pick.uniform(0, 1, 200).tolist()
    assert verdict(base, base, 0.01).outcome == gate.PASS
    assert verdict([one * 0.8 for one in base], base, 0.02).outcome == gate.FAIL
    assert verdict(base[:20], base[:20], 0.01).outcome == gate.UNDECIDED


def test_what_cannot_be_compared_is_not_judged_and_says_why() -> None:
    (metric,) = judge({"t": task(BASE)}, {"t": task(BASE, metric="acc_norm")}, 0.01)
    (shots,) = judge({"t": task(BASE)}, {"t": task(BASE, shots=5)}, 0.01)
    (missing,) = judge({"t": task(BASE)}, {}, 0.01)
    (perplexity,) = judge({"t": {"metric": None, "shots": 0, "count": 3, "questions": {}}}, {}, 0.01)
    assert {one.outcome for one in (metric, shots, missing, perplexity)} == {gate.NOT_JUDGED}
    assert "acc_norm" in metric.why and "shown 5" in shots.why
    assert worst([metric]) == gate.NOT_JUDGED
    assert worst([metric, verdict(BASE, BASE, 0.02)]) == gate.PASS
    assert worst([verdict(BASE, BASE, 0.02), verdict(changed(60, 5), BASE, 0.02)]) == gate.FAIL


def test_the_card_is_a_baseline_without_questions() -> None:
    entries = suite("minitron-card")
    base = read_baseline(CARD, entries)
    card = {"mmlu": 0.586, "hellaswag": 0.75, "winogrande": 0.74, "arc_challenge": 0.509, "gsm8k": 0.241,
            "minitron_xlsum_en": 0.295, "minitron_humaneval": 0.233}  # fmt: skip
    assert {name: one["value"] for name, one in base.items()} == card  # nvidia/Minitron-4B-Base's card
    shots = {"mmlu": 5, "hellaswag": 10, "winogrande": 5, "arc_challenge": 25, "gsm8k": 5}
    assert {entry.task: entry.shots for entry in entries if entry.task in shots} == shots
    scores = [1.0] * 938 + [0.0] * 329  # 74.03 % of Winogrande's 1,267
    ours = {"winogrande": task(scores, shots=5), "mmlu": task(BASE[250:350], shots=5)}
    near, far = judge(ours, base, 0.04)
    assert near.outcome == gate.PASS and near.method == "not paired"
    assert far.outcome == gate.UNDECIDED  # half of 100, against 58.6 %


def test_a_baseline_is_a_run_of_one_subject(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="no run"):
        read_baseline(str(path), [])
    document: dict[str, Any] = {"kind": "tasks", "schema": 1, "subjects": [{"tasks": {"t": task(BASE)}}] * 2}
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="2 subjects"):
        read_baseline(str(path), [])
    path.write_text(json.dumps(document | {"subjects": document["subjects"][:1]}))
    assert read_baseline(str(path), [SuiteTask("t")])["t"]["value"] == 0.6
