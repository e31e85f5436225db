"""Load tests as whole runs, against a bare process that speaks Triton's protocol (``bare_triton``).

Expected values: the plan, the raw records, and what the bare server noted itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bare_process import Bare
from conftest import ROOMS, ROOT, minitron
from minitron_client.bench import profile as profiles
from minitron_client.bench.loops import closed_loop
from minitron_client.bench.process import no_pauses
from minitron_client.bench.record import Record, read_records
from minitron_client.bench.schedule import plan
from minitron_client.bench.sender import GrpcSender, serialize
from minitron_client.bench.statistics import percentile
from minitron_client.bench.summary import Window
from minitron_client.bench.watch import GoneWatch
from minitron_client.client import Request
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import Endpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    server = Bare(tmp_path)
    yield server
    server.end()


def start(*words: str) -> subprocess.Popen[str]:
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    return subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", *words], env=os.environ | {"PYTHONPATH": rooms},
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
    return ["bench", "--url", bare.url, "--output", str(folder), *flat]


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
            assert found == round(percentile([value or 0 for value in values], share)) / 1e6
    assert len(result["workers"]) == 4 and result["summary"]["outcomes"] == {"ok": len(records)}
    assert result["summary"]["output_tokens"] == 5 * len(records)
    # what was sent is what the plan says, once each, and what the server got
    planned = json.loads(minitron(*words(bare, folder, arrival__rate=60, workers=4), "--dry-run", "--json").stdout)
    assert sorted(one.index for one in records) == [row[0] for row in planned["requests"]]
    start_ns = result["start_ns"]
    assert {one.index: one.intended_ns - start_ns for one in records} == {row[0]: row[1] for row in planned["requests"]}
    got = Counter(one["id"] for one in bare.events("request") if one["id"].startswith("load-"))
    assert got == Counter(f"load-0-{one.index}" for one in records)


def test_sending_makes_no_garbage_and_is_not_stopped_to_look_for_it(bare: Bare) -> None:
    """Else the collector could not be held back, or would stop the clock in the middle of a measurement."""
    found: list[tuple[bool, int]] = []

    class Watched(GrpcSender):
        async def send(self, *words: Any) -> Record:
            found[-1] = (gc.isenabled(), found[-1][1])
            return await super().send(*words)

    async def main() -> None:
        served = ServedModel("tensorrt_llm_bls", "bls", decoupled=True, batched=True,
                             inputs={"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL"})  # fmt: skip
        for behaviour, deadline_s in (({"interval_ms": 0}, None), ({"error": "x"}, None), ({"silent": True}, 0.05)):
            wire = Watched(Endpoint(bare.url))
            asked = [serialize(served, Request(json.dumps(behaviour), max_tokens=3), "a")] * 100
            found.append((True, 0))
            await closed_loop(wire, asked[:20], 20, deadline_s)  # what is made once
            gc.collect()
            await closed_loop(wire, asked, 20, deadline_s)
            found[-1] = (found[-1][0], gc.collect())
            await wire.close()

    asyncio.run(main())
    assert gc.isenabled() and [enabled for enabled, _ in found] == [False] * 3
    assert max(garbage for _, garbage in found) < 20, "fewer than one object for five requests"


def _policies() -> set[int]:
    """Scheduling policies of this process's threads."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


def test_what_measures_runs_in_real_time_where_that_is_permitted(bare: Bare, tmp_path: Path) -> None:
    """chrt (util-linux) says whether it is; threads that come later are meant, too."""
    permitted = subprocess.run(["chrt", "--fifo", "1", "true"], check=False, capture_output=True).returncode == 0
    with no_pauses(), ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(_policies).result()
    assert meanwhile == {os.SCHED_FIFO if permitted else os.SCHED_OTHER}
    assert _policies() == {os.SCHED_OTHER}
    minitron(*words(bare, tmp_path / "run", arrival__rate=20))
    scheduling = json.loads((tmp_path / "run" / "run.json").read_text())["machine"]["scheduling"]
    assert scheduling == ("real time" if permitted else "normal")


@pytest.mark.parametrize(("prefix", "expected"), [
    (["chrt", "--batch", "0"], "as given"),
    (["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", "--"] if os.geteuid() == 0 else [], "normal"),
])  # fmt: skip
def test_a_policy_that_the_user_chose_or_may_not_change_stays(prefix: list[str], expected: str) -> None:
    program = (
        "import os; from minitron_client.bench.process import no_pauses, scheduling\n"
        "before = os.sched_getscheduler(0)\nwith no_pauses(): assert os.sched_getscheduler(0) == before\n"
        "print(scheduling())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)}
    command = [*prefix, sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("own", [None, "-tcp_frame_size_tuning"])
def test_senders_are_started_with_the_cheaper_grpc_or_the_users_own(
    bare: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    if own is not None:
        monkeypatch.setenv("GRPC_EXPERIMENTS", own)
    process = start(*words(bare, tmp_path / "run", arrival__rate=50, duration_s=2))
    wait_for_records(process, tmp_path / "run", 5)
    settings = {one.environ().get("GRPC_EXPERIMENTS") for one in psutil.Process(process.pid).children()}
    process.communicate(timeout=60)
    assert settings == {"-event_engine_client" if own is None else own} and process.returncode == 0


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


FOUND_NOBODY = {"NotReady", "StreamBroken"}


def killed_under(process: subprocess.Popen[str], bare: Bare, folder: Path, after: int) -> dict[str, Any]:
    """The result of a load test whose server is killed once ``after`` requests have ended; it must say so, and when."""
    wait_for_records(process, folder, after)
    bare.process.kill()
    stdout, stderr = process.communicate(timeout=120)
    result, records = json.loads(stdout), records_of(folder)
    first = min((one for one in records if one.outcome in FOUND_NOBODY), key=lambda one: one.ended_ns)
    gone = result["server_gone"]
    assert (result["stopped"], gone["request"], gone["error"]) == ("server gone", first.index, first.error)
    assert gone["at_s"] == (first.ended_ns - result["start_ns"]) / 1e9
    assert result["window"]["end_ns"] <= first.ended_ns
    assert json.loads((folder / "run.json").read_text())["server_gone"] == gone
    assert process.returncode == 7 and f"since {gone['at_s']:.1f} s after the start, request {first.index}" in stderr
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", [1, 3])
def test_sending_stops_when_the_server_is_gone_and_loses_no_request(bare: Bare, tmp_path: Path, workers: int) -> None:
    """Of 10 minutes of requests those are there that were sent, once each, and those that it answered are whole."""
    settings: dict[str, Any] = {"arrival__rate": 50, "duration_s": 600, "workers": workers}
    result = killed_under(start(*words(bare, tmp_path / "run", **settings), "--json"), bare, tmp_path / "run", 100)
    records = records_of(tmp_path / "run")
    planned = plan(profiles.load(None, [("arrival.rate", 50), ("duration_s", 600), ("warm_up_s", 1)]))
    assert len(records) == len({one.index for one in records}) < len(planned)
    if workers == 1:
        assert sorted(one.index for one in records) == list(range(len(records)))
    assert set(result["summary"]["outcomes"]) <= {"ok", "Cancelled", *FOUND_NOBODY}
    assert result["summary"]["outcomes"]["ok"] >= 100 and result["summary"]["requests_per_s"] > 0
    ended = {one["id"] for one in bare.events("end")}
    assert {f"load-0-{one.index}" for one in records if one.outcome == "ok"} <= ended


def test_a_closed_loop_waits_for_a_server_that_is_gone_and_sends_it_nothing(bare: Bare, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"arrival__kind": "closed", "arrival__concurrency": 8, "arrival__requests": 20_000,
                                "duration_s": 600, "warm_up_s": 0}  # fmt: skip
    result = killed_under(start(*words(bare, tmp_path / "run", **settings), "--json"), bare, tmp_path / "run", 100)
    nobody = sum(count for kind, count in result["summary"]["outcomes"].items() if kind in FOUND_NOBODY)
    assert 1 <= nobody <= 8, "one of each stream at most"


def test_latency_ends_when_the_server_is_gone_and_keeps_what_was_measured(bare: Bare, tmp_path: Path) -> None:
    grid = ["4:4:1", "3:4000:2", "2:4:1"]
    process = start("bench", "--grid", *grid, "--repeats", "2", "--url", bare.url, "--output", str(tmp_path / "r"))
    while not any(one["inputs"]["max_tokens"] == 4000 and "end_id" in one["inputs"] for one in bare.events("request")):
        assert process.poll() is None
        time.sleep(0.02)
    bare.process.kill()
    stdout, stderr = process.communicate(timeout=120)
    result = json.loads((tmp_path / "r").read_text())
    whole = result["points"][0]
    assert whole["point"] == {"input_tokens": 4, "output_tokens": 4, "concurrency": 1}
    assert (whole["requests"], whole["failures"]) == (4, {}) and len(result["points"]) <= 2
    assert process.returncode == 7 and "the server is gone since" in stderr and "TTFT ms" in stdout
    assert result["server_gone"]["request"] == 5  # a warm-up request and 4 of the first point come before


def test_a_server_that_comes_back_in_time_is_not_gone(tmp_path: Path) -> None:
    async def main() -> None:
        server = Bare(tmp_path)
        wire = GrpcSender(Endpoint(server.url))
        watch, record = GoneWatch(wire), Record(3, 0, ended_ns=time.monotonic_ns(), outcome="NotReady")
        await watch.look_after(record)
        assert watch.suspected is None  # it was there all the time
        server.end()
        assert not await wire.is_ready(0.5)
        asking = asyncio.ensure_future(wire.is_ready(120))
        await asyncio.to_thread(server.start)
        assert await asking
        server.end()
        await watch.look_after(dataclasses.replace(record, outcome="Rejected"))  # somebody said that
        assert watch.suspected is None
        await watch.look_after(dataclasses.replace(record, ended_ns=time.monotonic_ns(), error="refused"))
        assert watch.sure and watch.suspected and (watch.suspected.index, watch.suspected.error) == (3, "refused")
        await wire.close()

    asyncio.run(main())


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
                    "--capacity", "--rate", "10", check=False)  # fmt: skip
    assert done.returncode == 8 and "carried no rate" in done.stderr
    assert minitron("bench", "--capacity", "--arrival", "closed", "--url", bare.url, check=False).returncode == 2


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
