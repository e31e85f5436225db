"""The client and its commands against the real Triton with the small Minitron."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import known_servers
import psutil
import pytest

import serving
from conftest import ROOMS, ROOT, minitron
from minitron.errors import DeadlineExceeded, InvalidRequest, NotReady, StreamBroken
from minitron_cli.main import main
from minitron_client.bench.record import Record
from minitron_client.client import AsyncClient, Client, Request

pytestmark = pytest.mark.server

FRONTS = ("tensorrt_llm_bls", "ensemble")
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def url(server: dict[str, Any]) -> str:
    return str(server["urls"]["grpc"])


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def gauge(server: dict[str, Any], pattern: str) -> float:
    """The sum of the metrics whose line matches ``pattern``."""
    with urllib.request.urlopen(f"http://{server['urls']['metrics']}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(pattern, line))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_chunks_are_the_whole_answer_and_counts_are_the_servers(client: Client, small_model: Path) -> None:
    from tokenizers import Tokenizer

    whole = client.generate(PROMPT, max_tokens=24)
    chunks = list(client.stream(PROMPT, max_tokens=24))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum(chunk.token_count or 0 for chunk in chunks) == whole.token_count == 24
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    ids = Tokenizer.from_file(str(small_model / "tokenizer.json")).encode(PROMPT).ids
    assert whole.input_token_count == len(ids)
    direct = client.generate(Request(input_ids=ids, max_tokens=24), model="tensorrt_llm")
    decoded = Tokenizer.from_file(str(small_model / "tokenizer.json")).decode([*ids, *direct.token_ids])
    assert direct.token_count == 24 and decoded.endswith(whole.text)


def test_every_dialect_has_its_own_way_to_the_same_tokens(client: Client) -> None:
    texts = [client.generate(PROMPT, max_tokens=16, model=model).text for model in FRONTS]
    assert texts[0].strip() == texts[1].strip()
    assert [client.served_model(model).dialect for model in (*FRONTS, "tensorrt_llm")] == ["bls", "ensemble", "tokens"]
    assert client.served_model().name == "tensorrt_llm_bls" and client.served_model("ensemble").decoupled


def test_stop_words_end_and_ignored_ends_do_not(client: Client) -> None:
    text = client.generate(PROMPT, max_tokens=24).text
    word = text.split()[3]
    stopped = client.generate(PROMPT, max_tokens=24, stop_words=[word])
    assert stopped.finish_reason == "stop" and len(stopped.text) < len(text)
    fixed = client.generate(PROMPT, max_tokens=300, min_tokens=300, ignore_end=True)
    assert fixed.token_count == 300


@pytest.mark.parametrize("model", FRONTS)
def test_cancel_and_deadline_stop_the_engine_and_leave_nothing(
    client: Client, server: dict[str, Any], model: str
) -> None:
    for _ in range(4):
        with client.stream(PROMPT, max_tokens=1500, ignore_end=True, model=model) as stream:
            next(stream)
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, max_tokens=1500, ignore_end=True, model=model, deadline_s=0.2)
    wait_until(lambda: gauge(server, r'nv_trt_llm_request_metrics{.*"active"') == 0)
    # A leaked ensemble would still be counted: every request that came has ended, well or not.
    wait_until(lambda: gauge(server, r"nv_inference_pending_request_count") == 0)


@pytest.mark.parametrize(("model", "streams"), [("tensorrt_llm_bls", 256), ("ensemble", 16)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 50}], ids=["greedy", "seeded"])
def test_streams_at_once_are_each_as_if_alone(url: str, model: str, streams: int, sampling: dict[str, Any]) -> None:
    """Each text equals the one that the same request streams when nothing else runs."""
    prompts = [f"{PROMPT} number {number}" for number in range(8)]

    async def main() -> tuple[list[str], list[str]]:
        async with AsyncClient(url) as client:

            async def read(number: int) -> str:
                request = {"model": model, "max_tokens": 12, "seed": number % 8, **sampling}
                return "".join([chunk.text async for chunk in client.stream(prompts[number % 8], **request)])

            alone = [await read(number) for number in range(8)]
            return alone, list(await asyncio.gather(*map(read, range(streams))))

    alone, together = asyncio.run(main())
    assert together == alone * (streams // 8)
    assert len(set(alone)) > 1


def test_a_port_that_is_not_grpc_has_its_type(server: dict[str, Any]) -> None:
    with Client(server["urls"]["http"], deadline_s=5) as wrong, pytest.raises((NotReady, DeadlineExceeded)):
        wrong.generate(PROMPT)


def test_refusals_have_their_types(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="max_seq_len"):
        client.generate(PROMPT, max_tokens=10**6)
    with pytest.raises(InvalidRequest, match="not supported"):
        client.generate(PROMPT, beam_width=2)
    with pytest.raises(InvalidRequest, match="token id"):
        client.generate(Request(input_ids=[10**6]), model="tensorrt_llm")
    with pytest.raises(NotReady, match="unknown model"):
        client.generate(PROMPT, model="nope")
    assert client.generate(PROMPT, max_tokens=2).token_count == 2


def test_questions(client: Client) -> None:
    assert client.is_live() and client.is_ready() and client.metadata()["name"] == "triton"
    assert client.config("ensemble")["platform"] == "ensemble"
    assert client.statistics()[0]["name"] == "tensorrt_llm_bls"


def test_commands(url: str, small_model: Path) -> None:
    assert len(minitron("generate", PROMPT, "--max-tokens", "8", "--url", url).stdout.split()) > 2
    ended = minitron("generate", PROMPT, "--max-tokens", "20", "--end-id", "977", "--url", url)
    assert ended.stdout == " of the world\n" and ended.stderr.startswith("4 tokens, ")
    assert "finish reason stop" in ended.stderr
    words: list[str | Path] = ["--grid", "8:6:2", "--repeats", "2", "--url", url, "--json"]
    for more in ((), ("--tokenizer", small_model)):  # the server counts, or its tokenizer
        point = json.loads(minitron("bench", *words, *more).stdout)["points"][0]
        assert point["input_tokens"] == [8, 8] and point["failures"] == {} and point["requests"] == 8
        assert point["metrics"]["ttft_ms"]["count"] == 8 and point["metrics"]["itl_ms"]["count"] == 8 * 5


def test_no_flags_are_needed_for_the_server_that_runs(server: dict[str, Any]) -> None:
    """Its state folder tells the address, and its repository holds the tokenizer; token ids become text with it."""
    states = Path(server["folder"]).parent
    result = json.loads(minitron("bench", "--state", states, "--json").stdout)
    assert [one["point"]["concurrency"] for one in result["points"]] == [1, 4]
    assert result["prompt_tokens_counted_by"] == f"the tokenizer in {server['repository']}/tokenizer"
    said = minitron("generate", PROMPT, "--max-tokens", "8", "--state", states).stdout
    assert (
        minitron("generate", PROMPT, "--max-tokens", "8", "--state", states, "--model", "tensorrt_llm").stdout == said
    )


@pytest.mark.parametrize("example", sorted(one.name for one in (ROOT / "examples").glob("*.py")))
def test_examples_run(url: str, example: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), url], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() and not done.stderr


def test_load_counts_agree_with_the_server(server: dict[str, Any], tmp_path: Path, small_model: Path) -> None:
    run = tmp_path / "run"
    words: list[str | Path] = [
        "--arrival", "poisson", "--rate", "15", "--duration", "5", "--warm-up", "1", "--input-tokens", "12",
        "--output-tokens", "8", "--workers", "2", "--tokenizer", small_model, "--output", run,
        "--metrics-url", server["urls"]["metrics"], "--url", server["urls"]["grpc"], "--json",
    ]  # fmt: skip
    result = json.loads(minitron("bench", *words).stdout)
    summary, counted = result["summary"], result["server"]
    assert summary["outcomes"] == {"ok": summary["sent"]} and summary["output_tokens"] == 8 * summary["sent"]
    assert counted["requests"] == summary["sent"] and counted["output_tokens"] == summary["output_tokens"]
    minitron("report", run)
    assert "<svg" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_run_ends_when_the_server_takes_more_than_it_can_finish(
    server: dict[str, Any], tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_client.bench.watch._RISE_SECONDS", 6)
    # More than it can do, and little enough that its queue takes longer than the watch to fill: after that it refuses.
    words = ["--arrival", "poisson", "--rate", "50", "--duration", "60", "--warm-up", "1", "--input-tokens", "8",
             "--output-tokens", "64", "--tokenizer", small_model, "--url", server["urls"]["grpc"],
             "--output", tmp_path / "run"]  # fmt: skip
    assert main(["bench", *map(str, words)]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert result["stopped"] == "saturated" and result["window"]["end_ns"] < result["start_ns"] + 50 * 10**9
    assert result["summary"]["outcomes"]["ok"] and result["summary"]["outcomes"]["Cancelled"]  # what was in flight
    assert result["summary"]["sent"] == len(lines(tmp_path / "run"))
    wait_until(lambda: gauge(server, r"nv_inference_pending_request_count") == 0)


@pytest.mark.slow
def test_a_stall_at_100_requests_a_second_and_the_servers_own_rate(tmp_path: Path, small_model: Path) -> None:
    """Coordinated omission and the cross-check, with a model that costs nothing: benches/scheduled_model."""
    with known_servers.triton() as server:
        words: list[str | Path] = [
            "--arrival", "constant", "--rate", "100", "--duration", "8", "--warm-up", "1", "--input-tokens", "8",
            "--output-tokens", "1", "--set", "fixed_output=false", "--tokenizer", small_model, "--json",
            "--model", "scheduled", "--url", server.endpoint.url, "--metrics-url", server.metrics_url,
            "--output", tmp_path / "run",
        ]  # fmt: skip
        with started("bench", *words) as process:
            wait_until(lambda: len(lines(tmp_path / "run")) >= 200)
            triton = tritonserver(psutil.Process())
            triton.suspend()
            time.sleep(1)
            triton.resume()
            result = json.loads(process.communicate(timeout=60)[0])
    assert result["summary"]["outcomes"] == {"ok": 799} and result["server"]["requests"] == 799
    assert result["summary"]["latency_ms"]["ttft_intended"]["p99"] >= 900
    assert any(one["seconds"] >= 0.9 and one["waiting"] >= 1 for one in result["stalls"])
    assert abs(result["server"]["requests_per_s_difference"]) <= 0.01


def tritonserver(serve: subprocess.Popen[str]) -> psutil.Process:
    """The server below ``minitron serve``."""
    children = psutil.Process(serve.pid).children(recursive=True)
    return next(one for one in children if one.name() == "tritonserver")


def started(*words: str | Path) -> subprocess.Popen[str]:
    """The command line as a user starts it, without waiting."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    return subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", *map(str, words)], env=os.environ | {"PYTHONPATH": rooms},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def own_server(small_repository: Callable[[str], Path]) -> Iterator[dict[str, Any]]:
    """A server that a test may stop and kill; what a killed one leaves is cleaned up, and nobody else's."""
    with serving.server(small_repository("bfloat16")) as document:
        yield document
    minitron("stop", "--all", "--state", Path(document["folder"]).parent, check=False)


@pytest.mark.slow
def test_load_over_a_stall_and_the_death_of_the_server(own_server: dict[str, Any], tmp_path: Path) -> None:
    """Coordinated omission, and one outcome for every request, with Triton itself stopped and then killed (-9).

    What watches over it is killed first, so that nothing starts it again.
    """
    triton, url = tritonserver(own_server["process"]), own_server["urls"]["grpc"]
    words = ["--arrival", "constant", "--rate", "10", "--duration", "600", "--warm-up", "1", "--input-tokens", "8",
             "--output-tokens", "2", "--json", "--url", url, "--output", tmp_path / "run"]  # fmt: skip
    with started("bench", *words) as process, Client(url, deadline_s=30) as client:
        wait_until(lambda: len(lines(tmp_path / "run")) >= 20)
        triton.suspend()
        time.sleep(1)
        triton.resume()
        wait_until(lambda: len(lines(tmp_path / "run")) >= 45)
        stream = client.stream(PROMPT, max_tokens=1500, ignore_end=True)
        next(stream)
        own_server["process"].kill()
        triton.kill()
        with pytest.raises(StreamBroken):
            list(stream)
        with pytest.raises(NotReady):
            client.generate(PROMPT)
        result = json.loads(process.communicate(timeout=60)[0])
    records = [Record.of_line(line) for line in lines(tmp_path / "run", ordered=True)]
    assert [one.index for one in records] == list(range(len(records))) and len(records) < 6000
    outcomes = result["summary"]["outcomes"]
    assert sum(outcomes.values()) == len(records) and outcomes["ok"] >= 40 and outcomes["NotReady"] >= 1
    assert set(outcomes) <= {"ok", "NotReady", "StreamBroken", "Cancelled"}
    assert (process.returncode, result["stopped"]) == (7, "server gone")
    assert max(one.intended_timing.ttft_ns or 0 for one in records if one.outcome == "ok") >= 900e6
    assert any(one["seconds"] >= 0.9 and one["waiting"] >= 1 for one in result["stalls"])


def lines(folder: Path, *, ordered: bool = False) -> list[str]:
    """The record lines of a run so far, by index where ``ordered``."""
    found = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(found, key=lambda line: int(json.loads(line)["index"])) if ordered else found
