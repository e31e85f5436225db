"""Load tests: schedules, lengths, slices, summaries, saturation, and stalls.

Expected values: the processes' textbook moments, and calculation by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import minitron
from minitron.errors import InputError, ServerError, UsageError
from minitron.prometheus import Metrics
from minitron_client.bench import profile as profiles
from minitron_client.bench.loops import Sendable
from minitron_client.bench.profile import Slo
from minitron_client.bench.record import Record
from minitron_client.bench.requests import SyntheticPrompts, make_requests
from minitron_client.bench.schedule import ScheduleSlice, plan
from minitron_client.bench.search import find_capacity
from minitron_client.bench.statistics import enough
from minitron_client.bench.summary import Summary, Window, summarize
from minitron_client.bench.watch import SaturationWatch, stalls
from minitron_client.client.dialect import ServedModel


def test_a_profile_is_read_as_strictly_as_a_recipe(tmp_path: Path) -> None:
    """PyYAML would keep the last of two equal keys, which nobody means."""
    (tmp_path / "twice.yaml").write_text("arrival: {kind: poisson, rate: 1}\narrival: {kind: poisson, rate: 2}\n")
    with pytest.raises(InputError, match="'arrival' stands twice"):
        profiles.load(str(tmp_path / "twice.yaml"))
    with pytest.raises(UsageError, match=r"there is no load profile nowhere\.yaml: it is neither a file nor"):
        profiles.load("nowhere.yaml")
    with pytest.raises(UsageError, match="stands twice"):
        profiles.parse_setting("arrival={rate: 1, rate: 2}")


def made(**values: Any) -> profiles.Profile:
    return profiles.load(None, list(values.items()))


def profile(**arrival: Any) -> profiles.Profile:
    return profiles.load(None, [("duration_s", 200), *((f"arrival.{key}", value) for key, value in arrival.items())])


# ---- schedules


def gaps(one: profiles.Profile) -> np.ndarray[Any, Any]:
    return np.diff([planned.at_ns or 0 for planned in plan(one)]) / 1e9


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert np.allclose(gaps(profile(kind="constant", rate=50)), 0.02, atol=1e-8)


@pytest.mark.parametrize(
    ("arrival", "shape"),
    [
        ({"kind": "poisson"}, 1.0),
        ({"kind": "gamma", "burstiness": 0.25}, 0.25),
        ({"kind": "gamma", "burstiness": 4}, 4),
    ],
)
def test_random_arrivals_have_the_rate_and_the_spread_of_their_process(arrival: dict[str, Any], shape: float) -> None:
    found = gaps(profile(**arrival, rate=100))  # about 20,000 gaps: three standard errors of the mean, wide ones else
    assert abs(found.mean() - 0.01) < 3 * 0.01 / math.sqrt(shape * len(found))
    assert found.std() / found.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.1)


def test_a_ramp_rises_linearly() -> None:
    times = np.array([one.at_ns or 0 for one in plan(profile(kind="ramp", rate=10, to_rate=50))]) / 1e9
    first, second = (times < 100).sum(), (times >= 100).sum()
    assert first == pytest.approx(100 * 20, rel=0.1) and second == pytest.approx(100 * 40, rel=0.1)  # mean rates 20, 40
    down = [one.at_ns or 0 for one in plan(profile(kind="ramp", rate=50, to_rate=0.001))]
    assert len(down) == pytest.approx(200 * 25, rel=0.1)


@pytest.mark.parametrize("name", [None, *profiles.shipped()])
def test_same_seed_same_plan_and_slices_make_the_whole(name: str | None) -> None:
    whole = plan(profiles.load(name))
    assert (whole == plan(profiles.load(name)) and whole != plan(profiles.load(name, [("seed", 1)]))) or name == "smoke"
    shares = [[one for one in whole if ScheduleSlice(number, 3).takes(one.index)] for number in (1, 2, 3)]
    assert sorted((one for share in shares for one in share), key=lambda one: one.index) == whole
    assert [sum(ScheduleSlice(n, of).share(count) for n in range(1, of + 1)) for of, count in ((3, 7), (4, 2))] == [
        7,
        2,
    ]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    served = ServedModel("m", "bls", decoupled=True, batched=True, inputs=dict.fromkeys(
        ("text_input", "max_tokens", "min_tokens", "end_id", "stream", "seed", "temperature"), "INT32") | {
        "text_input": "BYTES", "seed": "UINT64", "temperature": "FP32", "stream": "BOOL"})  # fmt: skip

    def sendable(seed: int) -> list[Sendable]:
        one = made(seed=seed, temperature=0.5, **{"input_tokens": {"kind": "uniform", "low": 2, "high": 9}})
        return make_requests(plan(one), one, served, SyntheticPrompts(lambda text: len(text.split()), seed=seed))

    first, again, other = sendable(1), sendable(1), sendable(2)
    assert first == again and len(first) > 10
    assert not {sent.message for _, _, sent in first} & {sent.message for _, _, sent in other}


def test_lengths_follow_their_distribution() -> None:
    for kind in ("normal", "lognormal"):
        tokens = {"kind": kind, "mean": 200, "deviation": 50}
        lengths = [one.input_tokens for one in plan(made(input_tokens=tokens, duration_s=5000, warm_up_s=0))]
        assert np.mean(lengths) == pytest.approx(200, rel=0.02) and np.std(lengths) == pytest.approx(50, rel=0.1)
    lengths = [one.output_tokens for one in plan(made(output_tokens={"kind": "uniform", "low": 3, "high": 5},
                                                      duration_s=500))]  # fmt: skip
    assert set(lengths) == {3, 4, 5}
    assert {one.input_tokens for one in plan(made(input_tokens=77))} == {77}


def test_traces_are_replayed_with_their_times_and_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"timestamp": ms, "input_length": n, "output_length": n + 1, "hash_ids": []}) + "\n"
        for ms, n in ((5000, 10), (7000, 20), (9000, 30))))  # fmt: skip
    (tmp_path / "b.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5000000,10,11\n"
        "2023-11-16 18:17:05.5000000,20,21\n2023-11-16 18:17:07.5000000,30,31\n"
    )
    for name in ("a.jsonl", "b.csv"):
        found = plan(profile(kind="trace", trace=str(tmp_path / name), speed=2))
        assert [(one.at_ns, one.input_tokens, one.output_tokens) for one in found] == [
            (0, 10, 11), (10**9, 20, 21), (2 * 10**9, 30, 31)]  # fmt: skip
    (tmp_path / "c.jsonl").write_text('{"timestamp": 1}\n')
    with pytest.raises(InputError, match="input_length"):
        plan(profile(kind="trace", trace=str(tmp_path / "c.jsonl")))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ([("arival.rate", 1)], UsageError), ([("arrival.rate", -1)], UsageError), ([("duration_s", "x")], UsageError),
        ([("warm_up_s", 99), ("duration_s", 9)], InputError), ([("arrival.kind", "trace")], InputError),
        ([("arrival.rat", 1)], UsageError),
        ([("input_tokens", {"low": 9, "high": 3})], UsageError),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_refused(settings: list[tuple[str, Any]], error: type[Exception]) -> None:
    with pytest.raises(error):
        profiles.load(None, settings)


def test_every_shipped_profile_is_explained_and_can_be_planned() -> None:
    assert profiles.shipped() == ["ramp-to-saturation", "smoke", "soak-one-hour", "steady-poisson"]
    for name in profiles.shipped():
        assert profiles.load(name).description
        assert "requests of" in minitron("bench", "--profile", name, "--dry-run").stdout


# ---- summaries


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=200), st.sampled_from([50, 90, 99]))
def test_percentiles_of_merged_summaries_are_exact(values: list[int], share: int) -> None:
    """To the ns, whoever added up which half; numpy's own nearest rank, on whole numbers, is the judge."""
    halves = [
        summarize([Record(0, 0, 0, [(one, 1)], one, outcome="ok") for one in half], Window(0, 1), Slo())
        for half in (values[::2], values[1::2])
    ]
    halves[0].merge(halves[1])
    found = halves[0].percentiles_ms("ttft")
    exact = int(np.percentile(np.array(values), share, method="inverted_cdf"))
    assert found and found[f"p{share}"] == (exact / 1e6 if enough(share, len(values)) else None)
    assert sorted(halves[0].latencies["ttft"]) == sorted(values)


def record(index: int, at: int, *, late: int = 0, outcome: str = "ok", step: int = 10, tokens: int = 4) -> Record:
    sent = at + late
    responses: list[tuple[int, int | None]] = [(sent + step * (i + 1), 1) for i in range(tokens)]
    return Record(index, at, sent, responses, sent + step * tokens, 5, tokens, outcome)


def test_summary_counts_what_the_definitions_say() -> None:
    ms = 10**6
    records = [
        record(0, 0, step=10 * ms),  # before the window (100..1000 ms), ends at 40: does not count
        record(1, 80 * ms, step=10 * ms),  # meant before it, ends inside: completed, 3 of its tokens counted
        record(2, 500 * ms, step=10 * ms),  # inside
        record(3, 600 * ms, late=200 * ms, step=10 * ms),  # inside, late: TTFT 10 ms, but 210 ms from its intended send
        record(4, 700 * ms, outcome="Rejected", tokens=0),  # inside, failed
        record(5, 990 * ms, step=10 * ms),  # meant inside, ends behind it: its token at 1000 lies outside
    ]
    window = Window(100 * ms, 1000 * ms)
    summary = summarize(records, window, Slo(ttft_ms=50))
    assert (summary.sent, summary.in_window, summary.completed, summary.good) == (6, 4, 3, 2)
    assert summary.tokens == 3 + 4 + 4 and summary.all_tokens == 20
    found = summary.document(window)
    assert found["requests_per_s"] == 3 / 0.9 and found["goodput_share"] == 2 / 4 and found["error_rate"] == 1 / 6
    assert found["latency_ms"]["ttft"] == {"p50": 10, "p90": None, "p99": None}  # three values
    largest = {name: max(summary.latencies[name]) for name in ("ttft", "ttft_intended", "send_lateness")}
    assert largest == {"ttft": 10 * ms, "ttft_intended": 210 * ms, "send_lateness": 200 * ms}
    merged = Summary()
    for part in (records[:2], records[2:]):
        merged.merge(summarize(part, window, Slo(ttft_ms=50)))
    assert merged.document(window) == found


def test_absent_counts_give_no_token_figures() -> None:
    one = Record(0, 0, 0, [(5, None)], 9, outcome="ok")
    found = summarize([one], Window(0, 10), Slo(tpot_ms=1)).document(Window(0, 10))
    assert set(found["latency_ms"]) == {"send_lateness", "e2e", "e2e_intended"}
    assert "output_tokens_per_s" not in found and found["goodput_share"] == 0


def test_saturation_is_a_rise_of_both() -> None:
    def after(in_flight: Callable[[int], float], ttft: Callable[[int], float]) -> bool:
        watch = SaturationWatch()
        for second in range(20):
            watch.feed(int(in_flight(second)), [ttft(second)])
        return watch.saturated

    assert after(lambda s: 5 + 4 * s, lambda s: 50 + 40 * s)
    assert not after(lambda s: 5 + 4 * s, lambda s: 50)
    assert not after(lambda s: 5, lambda s: 50 + 40 * s)
    assert not after(lambda s: 5 + s % 3, lambda s: 50 + s % 5)


def test_stalls_are_gaps_in_which_requests_waited() -> None:
    s = 10**9
    busy = Record(0, 0, 0, [(s, 1), (2 * s, 1), (5 * s, 1)], 5 * s, outcome="ok")
    idle = Record(1, 9 * s, 9 * s, [(9 * s + 10**8, 1)], 9 * s + 10**8, outcome="ok")  # nothing was asked before it
    found = stalls([busy, idle], itl_p99_ms=20, start_ns=0)
    assert found == [{"at_s": 0, "seconds": 1, "waiting": 1}, {"at_s": 1, "seconds": 1, "waiting": 1},
                     {"at_s": 2, "seconds": 3, "waiting": 1}]  # fmt: skip
    assert [one["at_s"] for one in stalls([busy], itl_p99_ms=200, start_ns=0)] == [2]  # a slow server is no stall


def test_capacity_is_found_and_repeated(tmp_path: Path) -> None:
    rates = []

    def measure(one: profiles.Profile, folder: Path) -> dict[str, Any]:
        rates.append(one.arrival.rate)
        good = one.arrival.rate <= 37
        return {"stopped": None, "summary": {"goodput_share": 1.0 if good else 0.5, "requests_per_s": one.arrival.rate}}

    found = find_capacity(made(**{"slo.ttft_ms": 1, "arrival.rate": 5}), measure, tmp_path, 0.95)
    assert 37 / 1.1 <= found["capacity_per_s"] <= 37 and rates[-3:] == [found["capacity_per_s"]] * 3
    with pytest.raises(UsageError, match="SLO"):
        find_capacity(made(), measure, tmp_path, 0.95)


@pytest.mark.parametrize(("stopped", "error"), [("server gone", ServerError), ("interrupted", KeyboardInterrupt)])
def test_a_search_ends_with_its_server_and_with_its_user(
    tmp_path: Path, stopped: str, error: type[BaseException]
) -> None:
    runs = []

    def measure(one: profiles.Profile, folder: Path) -> dict[str, Any]:
        runs.append(one)
        gone = {"at_s": 1.0, "request": 7, "error": "refused"}
        return {"stopped": stopped, "server_gone": gone, "summary": {"goodput_share": 0.0, "requests_per_s": 0.0}}

    with pytest.raises(error):
        find_capacity(made(**{"slo.ttft_ms": 1}), measure, tmp_path, 0.95)
    assert len(runs) == 1


def test_prometheus_text_is_read() -> None:
    page = Metrics.parse('# HELP x\nx{model="a",reason="O\\"K"} 3\nx{model="b"} 4.5\ny 1e3\nz{q="1"} NaN\n')
    assert page.sum("x") == 7.5 and page.sum("x", model="a") == 3 and page.sum("y") == 1000 and page.sum("none") is None
    assert page.gained(Metrics.parse("y 900\n"), "y") == 100
