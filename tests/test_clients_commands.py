"""``minitron generate`` and ``minitron bench`` as users run them, against a bare process (``bare_triton``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bare_process import Bare, unused_port
from conftest import ROOMS, ROOT, minitron, minitron_here


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(bare: Bare) -> None:
    done = minitron("generate", '{"tokens": 3}', "--url", bare.url, "--temperature", "0.5", "--stop", "x")
    assert done.stdout == " w0 w1 w2\n"
    assert done.stderr.startswith("3 tokens, ") and "TTFT" in done.stderr and "tokens/s" in done.stderr
    inputs = bare.events("request")[-1]["inputs"]
    assert (inputs["temperature"], inputs["stop_words"], inputs["stream"]) == (0.5, "x", True)


def test_generate_from_file_and_stdin(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text('{"tokens": 2}')
    assert minitron("generate", "--file", tmp_path / "prompt", "--url", bare.url, "--no-stream").stdout == " w0 w1\n"
    with (tmp_path / "prompt").open() as text:
        words = [sys.executable, "-m", "minitron_cli", "generate", "--url", bare.url]
        rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        environment = os.environ | {"PYTHONPATH": rooms}
        done = subprocess.run(words, stdin=text, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == " w0 w1\n"


def test_generate_json_is_one_document(bare: Bare) -> None:
    answer = json.loads(minitron("generate", '{"tokens": 3}', "--url", bare.url, "--json").stdout)
    assert (answer["text"], answer["output_tokens"], answer["finish_reason"]) == (" w0 w1 w2", 3, "stop")
    assert answer["ttft_ms"] > 0 and answer["e2e_ms"] >= answer["ttft_ms"]
    ids = json.loads(
        minitron("generate", "--ids", "5,6", "--model", "tensorrt_llm", "--url", bare.url, "--json").stdout
    )
    assert ids["outputs"][0]["token_ids"] == list(range(8)) and ids["input_tokens"] == 2


def test_generate_gives_an_answer_that_ended_by_itself(bare: Bare) -> None:
    for words in ((), ("--no-stream",)):
        done = minitron("generate", '{"tokens": 99}', "--url", bare.url, "--end-id", "4", "--max-tokens", "20", *words)
        assert done.stdout == " w0 w1 w2 w3\n"
        assert done.stderr.startswith("4 tokens, ") and "finish reason stop" in done.stderr
        done = minitron("generate", '{"tokens": 99}', "--url", bare.url, "--end-id", "0", *words)
        assert done.stdout == "\n"
        assert done.stderr.startswith("0 tokens, ") and "finish reason stop" in done.stderr


def test_generate_says_each_failure_in_a_line_with_its_exit_code(bare: Bare) -> None:
    for words, code in (
        (["x", "--url", f"127.0.0.1:{unused_port()}"], 10),
        (['{"error": "Maximum queue size of 1 has been reached"}', "--url", bare.url], 11),
        (["x", "--url", bare.url, "--top-p", "7"], 12),
        (['{"silent": true}', "--url", bare.url, "--deadline", "0.3"], 13),
        (["x", "--ids", "1", "--url", bare.url], 2),
        (["--file", "/nowhere", "--url", bare.url], 3),
        (["x", "--url", bare.url, "--num-return-sequences", "2"], 2),
    ):
        done = minitron("generate", *words, check=False)
        assert done.returncode == code, (words, done.stderr)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("minitron: error: ")


def test_generate_sends_the_api_key_of_a_file(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    minitron("generate", "x", "--url", bare.url, "--api-key-file", tmp_path / "key")
    assert bare.events("request")[-1]["metadata"]["triton-grpc-protocol-api-key"] == "s3cret"
    (tmp_path / "key").write_text("")
    done = minitron("generate", "x", "--url", bare.url, "--api-key-file", tmp_path / "key", check=False)
    assert done.returncode == 3


def test_latency_asks_exact_lengths_and_reports_every_metric(bare: Bare, tmp_path: Path) -> None:
    before = len(bare.events("request"))
    words = ["--grid", "7:5:1", "3:4:2", "--repeats", "2", "--rounds", "2", "--url", bare.url]
    done = minitron("bench", *words, "--json", "--output", tmp_path / "run.json")
    run = json.loads(done.stdout)
    assert json.loads((tmp_path / "run.json").read_text()) == run
    asked = [one["inputs"] for one in bare.events("request")[before:]]
    measured = [one for one in asked if one["max_tokens"] > 1]  # the others count prompt tokens
    # a warm-up request and 2 repeats x 2 rounds x streams for each point; the bare server counts words
    assert sorted((len(one["text_input"].split()), one["max_tokens"]) for one in measured) == (
        [(3, 4)] * (1 + 2 * 2 * 2) + [(7, 5)] * (1 + 2 * 2 * 1)
    )
    assert all(one["min_tokens"] == one["max_tokens"] and one["end_id"] == -1 for one in measured)
    assert len({one["text_input"] for one in measured}) == len(measured)
    first = run["points"][0]
    assert first["requests"] == 4 and first["failures"] == {} and first["input_tokens"] == [7, 7]
    assert {name: one["count"] for name, one in first["metrics"].items()} == {
        "ttft_ms": 4, "itl_ms": 4 * 4, "tpot_ms": 4, "e2e_ms": 4}  # fmt: skip
    assert first["tokens_per_s"]["low"] < first["tokens_per_s"]["value"] < first["tokens_per_s"]["high"]
    assert "min_tokens = max_tokens" in run["lengths"] and run["roofline"] is None


def test_latency_table_baseline_and_ratio(bare: Bare, tmp_path: Path) -> None:
    words = ["bench", "--grid", "4:4:1", "--repeats", "2", "--url", bare.url]
    minitron(*words, "--output", tmp_path / "run.json")
    run = json.loads((tmp_path / "run.json").read_text())
    rate = run["points"][0]["tokens_per_s"]
    rate.update(value=rate["value"] / 1e6, low=rate["low"] / 1e6, high=rate["high"] / 1e6)
    for metric in run["points"][0]["metrics"].values():
        assert metric["p99"] is None  # 4 requests, 12 times between tokens
        metric["p50"].update({name: value * 1e6 for name, value in metric["p50"].items()})
    (tmp_path / "slow.json").write_text(json.dumps(run))
    done = minitron(*words, "--baseline", tmp_path / "slow.json", "--beside", tmp_path / "slow.json")
    assert "TTFT ms" in done.stdout and "x 16-bit" in done.stdout and "Fixed lengths" in done.stdout
    assert done.stdout.count("of too few values") == 1
    rate.update(value=1e9, low=1e9, high=1e9)
    (tmp_path / "fast.json").write_text(json.dumps(run))
    done = minitron(*words, "--baseline", tmp_path / "fast.json", check=False)
    assert done.returncode == 8 and "tokens/s was 1e+09" in done.stderr


def test_a_grid_and_a_load_do_not_mix(bare: Bare) -> None:
    for words in (
        ["--grid", "2:2:1", "--rate", "3"],
        ["--profile", "smoke", "--repeats", "2"],
        ["--capacity", "--rounds", "1"],
    ):
        code, _, said = minitron_here("bench", "--url", bare.url, *words)
        assert code == 2 and "is of a grid and" in said and "of a load" in said
    code, _, said = minitron_here("bench", "--url", bare.url, "--warm-up", "0.5")
    assert code == 2 and "whole number" in said


def test_latency_refuses_what_it_cannot_measure(bare: Bare, tmp_path: Path) -> None:
    for words, code in (
        (["--grid", "4:4"], 2), (["--grid", "0:4:1"], 2), (["--model", "tensorrt_llm"], 2), (["--repeats", "0"], 2),
        (["--tokenizer", tmp_path], 3), (["--baseline", tmp_path / "none"], 3), (["--model", "llmapi"], 12),
    ):  # fmt: skip
        done = minitron("bench", "--url", bare.url, *words, check=False)
        assert done.returncode == code, (words, done.stderr)
