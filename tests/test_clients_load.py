"""Load tests: schedules, lengths, slices, histograms, summaries, saturation, stalls, and whole runs.

Expected values: the processes' textbook moments, hand calculation, raw records, and what the bare server noted itself.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bare_process import Bare
from conftest import ROOMS, ROOT, minitron
from minitron_trtllm.errors import InputError, UsageError
from minitron_trtllm.load import profile as profiles
from minitron_trtllm.load.histogram import Histogram
from minitron_trtllm.load.profile import Slo
from minitron_trtllm.load.record import Record
from minitron_trtllm.load.saturation import SaturationWatch
from minitron_trtllm.load.schedule import Slice, plan
from minitron_trtllm.load.search import find_capacity
from minitron_trtllm.load.statistics import percentile
from minitron_trtllm.load.summary import Summary, Window, read_records, summarize
from minitron_trtllm.load.timeline import stalls
from minitron_trtllm.prometheus import Metrics


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
    shares = [[one for one in whole if Slice(number, 3).takes(one.index)] for number in (1, 2, 3)]
    assert sorted((one for share in shares for one in share), key=lambda one: one.index) == whole
    assert [sum(Slice(n, of).share(count) for n in range(1, of + 1)) for of, count in ((3, 7), (4, 2))] == [7, 2]


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
        assert "requests of" in minitron("load", "--profile", name, "--dry-run").stdout


# ---- histograms and summaries


@given(st.lists(st.integers(0, 2**42 - 1), min_size=1, max_size=200), st.sampled_from([1, 50, 90, 99, 100]))
def test_histogram_percentiles_are_within_its_precision(values: list[int], share: int) -> None:
    histogram, other = Histogram(), Histogram()
    histogram.record(values[::2])
    other.record(values[1::2])
    histogram.merge(Histogram.of_document(json.loads(json.dumps(other.document()))))
    exact = percentile(values, share)
    found = histogram.percentile(share)
    assert found is not None and abs(found - exact) <= max(exact / 1024, 0.5) and histogram.count == len(values)


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
    assert found["latency_ms"]["ttft"]["p99"] == pytest.approx(10, rel=1e-3)
    assert found["latency_ms"]["ttft_intended"]["p99"] == pytest.approx(210, rel=1e-3)
    assert found["latency_ms"]["send_lateness"]["p99"] == pytest.approx(200, rel=1e-3)
    again = Summary.of_state(json.loads(json.dumps(summary.state())))
    assert again.document(window) == found


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


def test_prometheus_text_is_read() -> None:
    page = Metrics.parse('# HELP x\nx{model="a",reason="O\\"K"} 3\nx{model="b"} 4.5\ny 1e3\nz{q="1"} NaN\n')
    assert page.sum("x") == 7.5 and page.sum("x", model="a") == 3 and page.sum("y") == 1000 and page.sum("none") is None
    assert page.gained(Metrics.parse("y 900\n"), "y") == 100


# ---- whole runs against the bare server


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    server = Bare(tmp_path)
    yield server
    server.end()


def start(*words: str) -> subprocess.Popen[str]:
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    return subprocess.Popen(
        [sys.executable, "-m", "minitron_trtllm.cli", *words], env=os.environ | {"PYTHONPATH": rooms},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def records_of(folder: Path) -> list[Record]:
    return [one for path in sorted(folder.glob("requests-*.jsonl")) for one in read_records(path)]


def wait_for_records(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while not folder.is_dir() or len(records_of(folder)) < count:
        assert process.poll() is None, "the load test ended too early"
        time.sleep(0.02)


def words(bare: Bare, folder: Path, **settings: Any) -> list[str]:
    pairs = {"duration_s": 4, "warm_up_s": 1, "input_tokens": 4, "output_tokens": 5, **settings}
    flat = [word for key, value in pairs.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    return ["load", "--url", bare.url, "--output", str(folder), *flat]


def test_four_workers_merged_equal_the_raw_records(bare: Bare, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = json.loads(minitron(*words(bare, folder, arrival__rate=60, workers=4), "--json").stdout)
    records = records_of(folder)
    window = Window(**result["window"])
    inside = [one for one in records if window.holds(one.intended_ns)]
    exact: dict[str, list[float | None]] = {
        "ttft": [one.timing.ttft_ns for one in inside], "e2e_intended": [one.intended_timing.e2e_ns for one in inside],
        "itl": [value for one in inside for value in one.timing.itl_ns],
    }  # fmt: skip
    for name, values in exact.items():
        for share in (50, 90, 99):
            found = result["summary"]["latency_ms"][name][f"p{share}"]
            assert found == pytest.approx(percentile([value or 0 for value in values], share) / 1e6, rel=1 / 1024)
    assert len(result["workers"]) == 4 and result["summary"]["outcomes"] == {"ok": len(records)}
    assert result["summary"]["output_tokens"] == 5 * len(records)
    # what was sent is what the plan says, once each, and what the server got
    planned = json.loads(minitron(*words(bare, folder, arrival__rate=60, workers=4), "--dry-run", "--json").stdout)
    assert sorted(one.index for one in records) == [row[0] for row in planned["requests"]]
    start_ns = result["start_ns"]
    assert {one.index: one.intended_ns - start_ns for one in records} == {row[0]: row[1] for row in planned["requests"]}
    got = Counter(one["id"] for one in bare.events("request") if one["id"].startswith("load-"))
    assert got == Counter(f"load-0-{one.index}" for one in records)


def test_slices_send_the_same_requests_as_the_whole(bare: Bare, tmp_path: Path) -> None:
    def got() -> dict[str, Any]:
        return {one["id"]: one["inputs"] for one in bare.events("request") if one["id"].startswith("load-")}

    common = words(bare, tmp_path / "whole", arrival__rate=20, duration_s=2)
    minitron(*common)
    whole = got()
    (tmp_path / "events.jsonl").write_text("")
    for number in (1, 2):
        minitron(*common[:4], str(tmp_path / "sliced"), *common[5:], "--slice", f"{number}/2")
    assert got() == whole
    assert minitron(*common, check=False).returncode == 4  # its records are there already


def test_closed_loop_keeps_its_concurrency(bare: Bare, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "arrival__kind": "closed",
        "arrival__concurrency": 3,
        "arrival__requests": 30,
        "warm_up_s": 0,
    }
    minitron(*words(bare, tmp_path / "run", **settings))
    records = records_of(tmp_path / "run")
    moments = sorted([(one.sent_ns, 1) for one in records] + [(one.ended_ns, -1) for one in records])
    assert len(records) == 30 and max(np.cumsum([step for _, step in moments])) == 3


def test_killing_the_server_loses_no_request_and_counts_none_twice(bare: Bare, tmp_path: Path) -> None:
    process = start(*words(bare, tmp_path / "run", arrival__rate=50), "--json")
    wait_for_records(process, tmp_path / "run", 50)
    bare.process.kill()
    stdout, _ = process.communicate(timeout=60)
    result, records = json.loads(stdout), records_of(tmp_path / "run")
    planned = plan(profiles.load(None, [("arrival.rate", 50), ("duration_s", 4), ("warm_up_s", 1)]))
    assert sorted(one.index for one in records) == [one.index for one in planned]
    assert set(result["summary"]["outcomes"]) <= {"ok", "StreamBroken", "NotReady"} and process.returncode == 0
    assert result["summary"]["outcomes"]["NotReady"] > 0
    ended = {one["id"] for one in bare.events("end")}
    assert {f"load-0-{one.index}" for one in records if one.outcome == "ok"} <= ended


def test_every_kind_of_failure_is_an_outcome(bare: Bare, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"unfinished": True}, {"error": "Maximum queue size of 4 has been reached"}, {"silent": True}, {}
    ]  # fmt: skip
    lines = [json.dumps({"prompt": json.dumps(one), "max_tokens": 8}) for one in asked]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {"arrival__kind": "closed", "arrival__requests": 4, "warm_up_s": 0, "deadline_s": 1,
                                "prompts__kind": "file", "prompts__path": tmp_path / "p.jsonl"}  # fmt: skip
    minitron(*words(bare, tmp_path / "run", **settings))
    outcomes = {one.index: one.outcome for one in records_of(tmp_path / "run")}
    assert outcomes == {0: "StreamBroken", 1: "Rejected", 2: "DeadlineExceeded", 3: "ok"}


def test_an_interrupt_keeps_what_was_measured(bare: Bare, tmp_path: Path) -> None:
    process = start(*words(bare, tmp_path / "run", arrival__rate=50, duration_s=60), "--json")
    wait_for_records(process, tmp_path / "run", 80)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    result = json.loads(stdout)
    assert process.returncode == 130 and result["stopped"] == "interrupted", stderr
    assert result["summary"]["sent"] == len(records_of(tmp_path / "run")) and result["summary"]["outcomes"]["ok"] >= 80
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_stalled_server_shows_in_the_intended_times(bare: Bare, tmp_path: Path) -> None:
    """Coordinated omission: the server is stopped for a second in the middle of 100 requests/s."""
    process = start(*words(bare, tmp_path / "run", arrival__kind="constant", arrival__rate=100), "--json")
    wait_for_records(process, tmp_path / "run", 180)
    bare.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    bare.process.send_signal(signal.SIGCONT)
    result = json.loads(process.communicate(timeout=60)[0])
    assert result["summary"]["latency_ms"]["ttft_intended"]["p99"] >= 900
    assert any(one["seconds"] >= 0.9 and one["waiting"] >= 1 for one in result["stalls"])


def test_find_capacity_against_a_server(bare: Bare, tmp_path: Path) -> None:
    done = minitron(*words(bare, tmp_path / "run", slo__ttft_ms=0.001, duration_s=2, warm_up_s=0),
                    "--find-capacity", "--rate", "10", check=False)  # fmt: skip
    assert done.returncode == 8 and "carried no rate" in done.stderr
    assert minitron("load", "--find-capacity", "--arrival", "closed", "--url", bare.url, check=False).returncode == 2


def test_prompt_sources(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one two", "max_tokens": 3}\n{"prompt": "three"}\n')
    turns = [{"from": "human", "value": "first"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns}, {"conversations": []}]))
    closed: dict[str, Any] = {"arrival__kind": "closed", "arrival__requests": 4, "warm_up_s": 0}
    for kind, name, expected in (
        ("file", "p.jsonl", {("one two", 3), ("three", 5)}),
        ("sharegpt", "s.json", {("first", 5)}),
    ):
        settings = closed | {"prompts__kind": kind, "prompts__path": tmp_path / name}
        minitron(*words(bare, tmp_path / kind, **settings))
        got = {(one["inputs"]["text_input"], one["inputs"]["max_tokens"]) for one in bare.events("request")
               if one["id"].startswith("load-")}  # fmt: skip
        assert expected <= got
    done = minitron(*words(bare, tmp_path / "x", prompts__kind="file", prompts__path=tmp_path / "s.json"), check=False)
    assert done.returncode == 3
