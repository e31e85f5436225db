"""Sizing by simulation: cases that can be calculated by hand, and laws of queues."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from conftest import minitron_here
from minitron.model.shape import ModelShape
from minitron_build.plan import traffic
from minitron_build.plan.limits import Limits
from minitron_build.plan.roofline import Machine
from minitron_build.plan.simulation import Arrival, EngineStep, StepTime, roofline_steps, simulate
from random_model import SHAPES

LIMITS = Limits(max_batch_size=2, max_input_len=64, max_seq_len=128, max_num_tokens=16)


def second(step: EngineStep) -> float:
    return 1.0


def test_one_request_by_hand() -> None:
    """40 tokens of prompt in pieces of 16 are three steps, the third brings the first of five tokens."""
    (one,) = simulate([Arrival(10.0, 40, 5)], LIMITS, 1024, second)
    assert (one.ttft_s, one.last_token_s, one.tpot_s) == (3.0, 17.0, 1.0)


def test_a_full_batch_makes_others_wait_in_their_order() -> None:
    """Two places, each taken for four steps: the third comes at step 5, the fourth with it."""
    outcomes = simulate([Arrival(0.0, 4, 4) for _ in range(4)], LIMITS, 1024, second)
    assert [one.first_token_s for one in outcomes] == [1.0, 1.0, 5.0, 5.0]
    assert [one.last_token_s for one in outcomes] == [4.0, 4.0, 8.0, 8.0]


def test_a_prompt_and_an_answer_share_a_step() -> None:
    """One generates (1 of 16 tokens), so the other's 40 are read as 15 + 15 + 10: three steps, not two and a half."""
    seen: list[EngineStep] = []

    def step_s(step: EngineStep) -> float:
        seen.append(step)
        return 1.0

    simulate([Arrival(0.0, 4, 8), Arrival(0.5, 40, 1)], LIMITS, 1024, step_s)
    assert [(step.sequences, step.prompt_tokens) for step in seen[:4]] == [(1, 4), (1, 15), (1, 15), (2, 10)]


def test_the_cache_makes_wait_as_the_batch_does() -> None:
    """64 tokens of cache are two blocks of 32, and each sequence of 40 takes both: one after the other."""
    outcomes = simulate([Arrival(0.0, 8, 32), Arrival(0.0, 8, 32)], LIMITS, 64, second)
    assert outcomes[1].first_token_s == outcomes[0].last_token_s + 1.0


def test_a_machine_s_pauses_are_played_back_to_those_who_wait() -> None:
    """benches/bench_sizing: a machine that stands still from 4.5 to 7.5, and where a step costs a second, makes the
    fifth step last from 4 to 8. Seen in a run of one request, that is what another one meets in the same seconds."""
    from bench_sizing import Costs, Paced

    costs = Costs(1.0, 0.0, 0.0, 0.0)
    seen: list[tuple[EngineStep, float]] = []

    def step_s(step: EngineStep) -> float:
        begins, ends = step.begins_s, step.begins_s + 1.0
        seconds = 1.0 if ends <= 4.5 or begins >= 7.5 else 4.0
        seen.append((step, seconds))
        return seconds

    (one,) = simulate([Arrival(0.0, 4, 8)], LIMITS, 1024, step_s)
    assert one.last_token_s == 11.0 and [step.begins_s for step, _ in seen] == [0, 1, 2, 3, 4, 8, 9, 10]
    assert simulate([Arrival(0.0, 4, 8)], LIMITS, 1024, Paced(costs, seen)) == [one]
    # Half of its first step is done before 4, the rest and half of the second at a quarter of the speed.
    (late,) = simulate([Arrival(3.5, 4, 2)], LIMITS, 1024, Paced(costs, seen))
    assert late.first_token_s == pytest.approx(6.0) and late.last_token_s == pytest.approx(8.5)
    (beyond,) = simulate([Arrival(20.0, 4, 2)], LIMITS, 1024, Paced(costs, seen))
    assert (beyond.first_token_s, beyond.last_token_s) == (21.0, 22.0)


def test_two_servers_share_by_what_is_outstanding() -> None:
    outcomes = simulate([Arrival(0.0, 4, 100), Arrival(0.1, 4, 2), Arrival(0.2, 4, 2)], LIMITS, 1024, second, servers=2)
    assert [one.server for one in outcomes] == [0, 1, 1]


def test_md1_queue() -> None:
    """One place, one token a request, a second each: an M/D/1 queue. Its mean wait is rho / (2 (1 - rho)) services
    (Pollaczek-Khinchine); at rho 0.6 that is 0.75 s, so the mean time to the token is 1.75 s."""
    gaps = np.random.default_rng(0).exponential(1 / 0.6, 40_000)
    arrivals = [Arrival(float(at), 4, 1) for at in gaps.cumsum()]
    one = Limits(max_batch_size=1, max_input_len=64, max_seq_len=128, max_num_tokens=16)
    outcomes = simulate(arrivals, one, 1024, second)
    mean = sum(each.ttft_s for each in outcomes) / len(outcomes)
    assert mean == pytest.approx(1.75, rel=0.05)


def test_the_roofline_of_a_step_is_that_of_the_plan() -> None:
    """Decode at batch 32 with 640 tokens each, and a prompt of 512: docs/plan.md's own rows for int8 on an A100, which
    'minitron plan --recipe a100-int8' shows as 9,491 tokens/s and 8.8 ms."""
    machine = Machine(2.039e12, 3.12e14)
    steps = roofline_steps(SHAPES["minitron-4b"], machine, matrix_bytes=4_190_109_696, kv_bytes=131_072)
    assert 32 / steps(EngineStep(32, 0, 32 * 640)) == pytest.approx(9491, rel=0.001)
    assert steps(EngineStep(1, 511, 512)) == pytest.approx(8.76e-3, rel=0.01)


def test_the_command_says_how_many(tmp_path: Path) -> None:
    """By the law of flow: 60 requests/s of 100 tokens are 6,000 tokens/s, and one server makes 9,491 at the roofline;
    at a third of it two are needed at the least."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("arrival: {rate: 60}\ninput_tokens: 100\noutput_tokens: 100\n")
    words = ("plan", "--recipe", "a100-int8", "--traffic", profile, "--slo", "1000,100", "--json")
    code, out, _ = minitron_here(*words)
    assert code == 0 and json.loads(out)["traffic"]["servers"] == 1
    code, out, _ = minitron_here(*words, "--roofline-share", "0.33")
    found = json.loads(out)["traffic"]
    assert code == 0 and found["servers"] >= 2 and found["gateway_workers"] >= 1
    assert found["tried"][-1]["good"] >= 0.95
    assert math.isclose(found["tried"][-1]["tokens_per_s"], 6000, rel_tol=0.1)


@pytest.mark.parametrize(
    ("words", "bytes_per_token"),
    [
        (("--recipe", "a100-int8"), 131_072),
        (("--recipe", "a100-int8", "--kv-cache", "int8"), 65_536),
        (("--recipe", "a100-int8", "--tp", "2"), 131_072),
        (("--recipe", "cpu", "--execution", "exact"), 262_144),
        (("--recipe", "cpu", "--execution", "exact", "--kv-cache", "int8"), 76_000),
        (("--recipe", "cpu", "--execution", "fast"), 76_000),
    ],
)
def test_a_simulated_step_reads_the_planned_kv_cache(
    words: tuple[str, ...], bytes_per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of 32 layers, 8 heads and 128 elements, of all ranks: 65,536 elements of 2, 1 or 4 bytes;
    OpenVINO's 8 bits with their scales were measured as 76,000 bytes."""
    read: list[int] = []

    def spied(shape: ModelShape, machine: Machine, *, matrix_bytes: int, kv_bytes: int) -> StepTime:
        read.append(kv_bytes)
        return roofline_steps(shape, machine, matrix_bytes=matrix_bytes, kv_bytes=kv_bytes)

    monkeypatch.setattr(traffic, "roofline_steps", spied)
    if "cpu" in words:
        words += ("--bandwidth", "20")
    code, _, said = minitron_here("plan", *words, "--traffic", "steady-poisson", "--slo", "100000,10000")
    assert code == 0, said
    assert read == [bytes_per_token]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--traffic", "steady-poisson"), "--slo"),
        (("--traffic", "steady-poisson", "--slo", "500"), "TTFT,ITL"),
        (("--traffic", "steady-poisson", "--slo", "500,50", "--roofline-share", "2"), "--roofline-share"),
        (("--traffic", "smoke", "--slo", "500,50"), "no times of arrival"),
        (("--traffic", "no-such", "--slo", "500,50"), "no load profile"),
        (("--traffic", "steady-poisson", "--slo", "500,50", "--input-tokens", "8", "--output-tokens", "8"), "workload"),
    ],
)
def test_what_cannot_be_sized_is_said(words: tuple[str, ...], says: str) -> None:
    code, _, err = minitron_here("plan", "--recipe", "a100-int8", *words)
    assert code in (2, 3) and says in err
