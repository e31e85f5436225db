"""Other people's clients against the gateway over the real server: OpenAI's for Python, lm-eval, aiperf, and curl.

They run as programs of their own, those in Python in an environment of their own (``make test-clients``, which names
its Python in CLIENTS_PYTHON). The judge of texts is the text model, asked by tritonclient, that of log probs the numpy
Nemotron of the tests, which test_models_reference.py holds against transformers.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from bare_process import Bare, prompt
from conftest import ROOT, SMALL_MODEL
from gateway_process import Gateway
from minitron.model import shape
from minitron.model.precision import Precision
from nemotron_reference import logits, rounded_weights, source_weights
from serving import Stream, text_of

pytestmark = [pytest.mark.clients, pytest.mark.server]

PROMPT = "In the beginning God created"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected(server: dict[str, Any]) -> str:
    own = Stream(server["urls"]["grpc"])
    text = text_of(own.responses("tensorrt_llm_bls", text_input=PROMPT, max_tokens=12))
    own.close()
    return text


def run(*words: str | Path, **environment: str) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def program(name: str) -> Path:
    """A command of the clients' environment."""
    return Path(os.environ["CLIENTS_PYTHON"]).with_name(name)


def openai_client(*words: str) -> Any:
    return json.loads(run(os.environ["CLIENTS_PYTHON"], HERE / "openai_client.py", *words))


def test_openai_s_client_gets_the_text_in_every_way_and_raises_what_it_should(gateway: Gateway, expected: str) -> None:
    found = openai_client(gateway.document["url"])
    assert found["models"] == ["minitron"]
    for way in ("whole", "tokens", "streamed", "async", "extra"):
        assert found[way] == expected, way
    assert found["finish"] == "length"
    assert found["usage"]["completion_tokens"] == found["streamed_usage"] == 12
    assert found["chat"][:2] == ["BadRequestError", 400] and "/v1/completions" in found["chat"][2]
    assert found["no_model"][:2] == ["NotFoundError", 404]
    assert found["too_long"][:2] == ["BadRequestError", 400]


def test_openai_s_client_raises_when_a_stream_breaks_and_passes_over_comments(tmp_path: Path) -> None:
    server = Bare(tmp_path, "--tokenizer", str(SMALL_MODEL))
    gateway = Gateway("--upstream", server.url, "--sse-keep-alive", "0.2")
    try:
        found = openai_client(gateway.document["url"], prompt(error="it broke", error_after=3, interval_ms=800))
        assert found["error"][0] == "APIError" and "it broke" in found["error"][2]
        assert found["text"]
    finally:
        gateway.end()
        server.end()


def test_curl_gets_an_answer_and_a_stream(gateway: Gateway, expected: str) -> None:
    url = gateway.document["url"] + "/completions"
    body = {"model": "minitron", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = run("curl", "-sS", "--fail", url, "-d", json.dumps(body))
    assert json.loads(whole)["choices"][0]["text"] == expected
    lines = run("curl", "-sSN", "--fail", url, "-d", json.dumps(body | {"stream": True})).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected


def test_lm_eval_scores_and_generates(gateway: Gateway, server: dict[str, Any], tmp_path: Path) -> None:
    """The command of docs/openai.md: each log prob, whether it is greedy, the accuracy, and each text."""
    url = gateway.document["url"] + "/completions"
    run(program("lm_eval"), "run", "--model", "local-completions",
        "--model_args", f"base_url={url},model=minitron,tokenizer=models/small-minitron,num_concurrent=4",
        "--include_path", "examples/lm_eval", "--tasks", "verse_endings,verse_writing", "--output_path", tmp_path,
        "--log_samples", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")  # fmt: skip
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    endings, writing = (samples(tmp_path, task) for task in ("verse_endings", "verse_writing"))
    assert len(endings) == len(writing) == 12
    right = []
    for one in endings:
        verse = one["doc"]
        expected = [scored(verse["beginning"], f" {ending}") for ending in verse["endings"]]
        answered = [(float(log_prob), greedy == "True") for ((log_prob, greedy),) in one["resps"]]
        assert [log_prob for log_prob, _ in answered] == pytest.approx([sums for sums, _ in expected], abs=2e-3)
        assert [greedy for _, greedy in answered] == [greedy for _, greedy in expected]
        right.append(int(np.argmax([sums for sums, _ in expected])) == verse["right"])
    assert found["verse_endings"]["acc,none"] == pytest.approx(np.mean(right))
    own = Stream(server["urls"]["grpc"])
    for one in writing:
        text = text_of(own.responses("tensorrt_llm_bls", text_input=one["doc"]["beginning"], max_tokens=24,
                                     stop_words=["\n", "."]))  # fmt: skip
        assert one["resps"] == [[text]]
    own.close()


def test_lm_eval_reads_and_minitron_eval_gives_the_same_figures(
    gateway: Gateway, server: dict[str, Any], tmp_path: Path
) -> None:
    """Whole texts, and all three tasks by ``minitron eval --url``, over HTTP and over gRPC."""
    url = gateway.document["url"]
    run(program("lm_eval"), "run", "--model", "local-completions",
        "--model_args", f"base_url={url}/completions,model=minitron,tokenizer=models/small-minitron,num_concurrent=4",
        "--include_path", "examples/lm_eval", "--tasks", "verse_endings,verse_writing,verse_reading",
        "--output_path", tmp_path, "--log_samples", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")  # fmt: skip
    reading = samples(tmp_path, "verse_reading")
    for one in reading:
        text = f"{one['doc']['beginning']} {one['doc']['endings'][one['doc']['right']]}"
        assert float(one["resps"][0][0]) == pytest.approx(scored("<s>", text)[0], abs=2e-3)
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    for address in (url, f"grpc://{server['urls']['grpc']}"):
        run(os.environ["CLIENTS_PYTHON"], "-m", "minitron_cli", "eval", "--url", address, "--tokenizer", SMALL_MODEL,
            "--tasks", ",".join(found), "--include", "examples/lm_eval", "--output", tmp_path / "run.json",
            HF_HOME=str(tmp_path / "cache"))  # fmt: skip
        tasks = json.loads((tmp_path / "run.json").read_text())["subjects"][0]["tasks"]
        assert len(found) == len(tasks) == 3
        for task, own in tasks.items():
            assert own["count"] == 12
            for name, value in own["figures"][task].items():
                assert value == pytest.approx(found[task][name], rel=1e-4), name


def samples(folder: Path, task: str) -> list[Any]:
    """What lm-eval noted of each document of a task."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache
def weights() -> Any:
    """Those that the server's engine has."""
    return rounded_weights(source_weights(SMALL_MODEL), Precision.BFLOAT16, "bfloat16")


def scored(context: str, ending: str) -> tuple[float, bool]:
    """The log prob of an ending, and whether each of its tokens is the likeliest one in its place."""
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    ids, first = tokenizer.encode(context + ending).ids, len(tokenizer.encode(context).ids)
    rows = logits(weights(), shape.read(SMALL_MODEL / "config.json"), np.array(ids)).astype(np.float64)[first - 1 : -1]
    log_probs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    own = log_probs[range(len(rows)), ids[first:]]
    return float(own.sum()), bool((own == log_probs.max(-1)).all())


def test_aiperf_counts_what_was_asked_for(gateway: Gateway, tmp_path: Path) -> None:
    """The command of docs/openai.md: 12 streams of 16 tokens behind prompts of 32, none of them failed."""
    if not program("aiperf").exists():
        pytest.skip("aiperf needs Python 3.11")
    url = gateway.document["url"].removesuffix("/v1")
    run(program("aiperf"), "profile", "--model", "minitron", "--url", url, "--endpoint-type", "completions",
        "--streaming", "--tokenizer", SMALL_MODEL, "--use-server-token-count", "--concurrency", "4",
        "--request-count", "12", "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:16", "--ui-type", "none",
        "--artifact-dir", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 12 and found["request_error_rate"]["avg"] == 0
    assert [found["output_sequence_length"][name] for name in ("min", "avg", "max")] == [16, 16, 16]
    assert [found["input_sequence_length"][name] for name in ("min", "max")] == [32, 32]
    assert found["time_to_first_token"]["min"] > 0 and found["inter_token_latency"]["min"] > 0
    line = 'minitron_gateway_requests_total{endpoint="completions",status="200"}'
    assert gateway.metric(line) >= 12
