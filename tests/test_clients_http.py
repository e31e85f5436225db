"""generate, latency and load over OpenAI's HTTP: a gateway over the real server, and over one that does as it is told.

The judge of texts and counts is the text model, asked by tritonclient, and what a prompt tells ``bare_triton`` to do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bare_process import Bare, prompt, unused_port
from conftest import SMALL_MODEL, minitron
from gateway_process import Gateway, within
from minitron.errors import ClientError, DeadlineExceeded, InvalidRequest, NotReady, Rejected, StreamBroken, UsageError
from minitron_client.client.blocking import HttpClient
from minitron_client.client.endpoint import ApiKey, Tls
from minitron_client.client.openai import HttpEndpoint, body
from minitron_client.client.request import Request
from serving import Stream, text_of
from test_gateway_faults import text

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROMPT = "In the beginning God created"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    one = Bare(tmp_path_factory.mktemp("bare"), "--tokenizer", str(SMALL_MODEL))
    yield one
    one.end()


@pytest.fixture(scope="module")
def told_gateway(told: Bare) -> Iterator[Gateway]:
    one = Gateway("--upstream", told.url)
    yield one
    assert one.end()[0] == 0


def client_of(gateway: Gateway, **options: Any) -> HttpClient:
    return HttpClient(HttpEndpoint(gateway.document["url"]), **options)


def test_the_command_s_text_and_counts_are_the_text_model_s(server: dict[str, Any], gateway: Gateway) -> None:
    own = Stream(server["urls"]["grpc"])
    expected = text_of(own.responses("tensorrt_llm_bls", text_input=PROMPT, max_tokens=12))
    own.close()
    words = ("generate", PROMPT, "--max-tokens", "12", "--url", gateway.document["url"])
    for more in ((), ("--no-stream",)):
        done = minitron(*words, *more)
        assert done.stdout == expected + "\n"
        assert done.stderr.startswith("12 tokens") and done.stderr.endswith("finish reason length, model minitron\n")
    document = json.loads(minitron(*words, "--json").stdout)
    assert (document["text"], document["output_tokens"], document["input_tokens"]) == (expected, 12, 11)
    assert 0 < document["ttft_ms"] < document["e2e_ms"] and document["tpot_ms"] > 0
    several = minitron(*words, "--num-return-sequences", "2", "--no-stream", "--top-k", "20", "--seed", "4")
    assert len(several.stdout.splitlines()) >= 2
    ids = json.loads(minitron("generate", "--ids", "300,301", "--max-tokens", "3", "--json", *words[4:]).stdout)
    assert ids["input_tokens"] == 2 and ids["output_tokens"] == 3


def test_every_event_says_how_many_tokens_there_are(told_gateway: Gateway) -> None:
    options = {"stream_options": {"continuous_usage_stats": True}, "n": 2}
    counts: dict[int, list[int]] = {0: [], 1: []}
    with told_gateway.stream(prompt(tokens=9, per_response=3), max_tokens=9, **options) as stream:
        for _, one in stream:
            counts[one["choices"][0]["index"]].append(one["usage"]["completion_tokens"])
    assert [made[-1] for made in counts.values()] == [9, 9]
    assert all(made == sorted(made) for made in counts.values())
    with client_of(told_gateway) as client, client.stream(prompt(tokens=9, per_response=3), max_tokens=9) as chunks:
        found = list(chunks)
    assert sum(chunk.token_count or 0 for chunk in found) == 9
    assert "".join(chunk.text for chunk in found) == text(9)


def test_a_request_means_the_same_as_over_grpc() -> None:
    """What a request leaves out is greedy there (TensorRT-LLM), and OpenAI's API samples where nothing is said."""
    assert json.loads(body(Request("x", max_tokens=5), "m", stream=False)) == {
        "model": "m", "prompt": "x", "max_tokens": 5, "temperature": 0,
    }  # fmt: skip
    asked = Request("x", max_tokens=8, min_tokens=8, ignore_end=True, top_k=3, seed=7, stop_words=["a"],
                    num_return_sequences=2, return_log_probs=True)  # fmt: skip
    assert json.loads(body(asked, "m", stream=True)) == {
        "model": "m", "prompt": "x", "max_tokens": 8, "min_tokens": 8, "ignore_eos": True, "top_k": 3, "seed": 7,
        "stop": ["a"], "n": 2, "logprobs": 0, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    for unknown in ({"beam_width": 2}, {"end_id": 5}, {"bad_words": ["x"]}, {"embedding_bias": {"x": 1.0}}):
        with pytest.raises(InvalidRequest, match=f"no parameter for {next(iter(unknown))}"):
            body(Request("x", **unknown), "m", stream=False)


@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        ({"error": "Maximum queue size of 4 has been reached, please try again later"}, Rejected, "HTTP 429"),
        ({"error": "out of luck"}, ClientError, "the engine failed: out of luck"),
        ({"error": "it broke", "error_after": 3}, ClientError, "it broke"),
        ({"tokens": 30_000}, InvalidRequest, "max_seq_len"),
    ],
)
def test_errors_are_those_of_the_grpc_client(
    told_gateway: Gateway, behaviour: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked: dict[str, Any] = {"max_tokens": 10**6 if "tokens" in behaviour else 9}
    with client_of(told_gateway) as client:
        with client.stream(prompt(**behaviour), **asked) as stream, pytest.raises(error, match=words):
            list(stream)
        with pytest.raises(error, match=words):  # with a stop text the whole answer is a stream behind the gateway too
            client.generate(prompt(**behaviour), stop_words=["zz"], **asked)


def test_a_deadline_and_leaving_end_the_request(told: Bare, told_gateway: Gateway) -> None:
    stopped = len(told.events("stop"))
    endless = prompt(tokens=9000, interval_ms=5)
    with client_of(told_gateway, deadline_s=0.5) as client, pytest.raises(DeadlineExceeded):
        client.generate(prompt(silent=True))
    assert within(20, lambda: len(told.events("stop")) == stopped + 1)
    with client_of(told_gateway) as client, client.stream(endless, max_tokens=9000) as stream:
        next(stream)
    assert within(20, lambda: len(told.events("stop")) == stopped + 2)


def test_who_is_not_there_who_asks_for_a_key_and_what_is_no_api(
    told: Bare, told_gateway: Gateway, tmp_path: Path, certificates: Path
) -> None:
    nobody = HttpEndpoint(f"http://127.0.0.1:{unused_port()}/v1")
    with HttpClient(nobody) as client, pytest.raises(NotReady, match="nothing answers there"):
        client.generate("x")
    other = told_gateway.document["url"].removesuffix("/v1") + "/elsewhere"
    with HttpClient(HttpEndpoint(other)) as wrong, pytest.raises(InvalidRequest, match="there is no such path"):
        wrong.generate("x")
    (tmp_path / "keys").write_text("a-key-of-sixteen-letters\n")
    tls = ("--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    gateway = Gateway("--upstream", told.url, "--api-key-file", tmp_path / "keys", *tls)
    ca = Tls(certificates / "ca.crt")
    try:
        endpoint = HttpEndpoint(gateway.document["url"], ca, ApiKey("a-key-of-sixteen-letters"))
        with HttpClient(endpoint) as client:
            assert client.generate(prompt(tokens=4), max_tokens=4).text == text(4)
        with HttpClient(HttpEndpoint(endpoint.url, ca)) as client, pytest.raises(InvalidRequest, match="no valid key"):
            client.generate("x")
        with HttpClient(HttpEndpoint(endpoint.url)) as client, pytest.raises(NotReady, match=r"(?i)certificate"):
            client.generate("x")
        done = minitron("generate", prompt(tokens=4), "--max-tokens", "4", "--url", endpoint.url, "--tls-ca",
                        certificates / "ca.crt", "--api-key-file", tmp_path / "keys")  # fmt: skip
        assert done.stdout == text(4) + "\n"
    finally:
        gateway.end()
    with pytest.raises(UsageError, match="give https"):
        HttpEndpoint("http://127.0.0.1:8080/v1", ca)
    with pytest.raises(UsageError, match="no URL"):
        HttpEndpoint("ftp://127.0.0.1/v1")


def test_a_stream_without_its_end_is_broken(told: Bare, told_gateway: Gateway, tmp_path: Path) -> None:
    """The gateway's own process dies in the middle of a stream."""
    gateway = Gateway("--upstream", told.url)
    with client_of(gateway) as client, client.stream(prompt(tokens=9000, interval_ms=5), max_tokens=9000) as stream:
        next(stream)
        gateway.process.kill()
        with pytest.raises(StreamBroken, match="incomplete"):
            list(stream)
    gateway.process.communicate()


def test_a_stream_whose_server_behind_the_gateway_dies_is_broken(start_bare: Callable[..., Bare]) -> None:
    gateway = Gateway("--upstream", start_bare("--tokenizer", str(SMALL_MODEL)).url)
    try:
        with client_of(gateway) as client, client.stream(prompt(tokens=50, die_after=4), max_tokens=50) as stream:
            next(stream)
            with pytest.raises(StreamBroken, match="the server that was answering was lost"):
                list(stream)
    finally:
        gateway.end()


def test_latency_counts_exactly_what_it_asked_for(gateway: Gateway, tmp_path: Path) -> None:
    done = minitron(
        "bench", "--grid", "16:8:2", "--repeats", "2", "--rounds", "2", "--url", gateway.document["url"], "--json",
        "--tokenizer", SMALL_MODEL,
    )  # fmt: skip
    document = json.loads(done.stdout)
    (point,) = document["points"]
    assert (document["dialect"], document["model"]) == ("openai", "minitron")
    assert point["requests"] == 8 and not point["failures"] and point["input_tokens"] == [16, 16]
    assert point["metrics"]["tpot_ms"]["count"] == 8 and point["metrics"]["itl_ms"]["count"] >= 8
    by_server = minitron("bench", "--grid", "16:4:1", "--repeats", "1", "--url", gateway.document["url"], "--json")
    assert json.loads(by_server.stdout)["prompt_tokens_counted_by"] == "the server"


def test_load_counts_what_the_server_counts(server: dict[str, Any], gateway: Gateway, tmp_path: Path) -> None:
    done = minitron(
        "bench", "--arrival", "closed", "--concurrency", "3", "--requests", "12", "--duration", "60", "--warm-up", "0",
        "--input-tokens", "16", "--output-tokens", "8", "--workers", "2", "--url", gateway.document["url"],
        "--tokenizer", SMALL_MODEL, "--metrics-url", server["urls"]["metrics"], "--output", tmp_path / "run", "--json",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document["summary"]["outcomes"] == {"ok": 12}
    assert document["server"]["requests"] == 12 and document["server"]["output_tokens"] == 96
    assert document["server"]["output_tokens_difference"] == 0


def test_a_gateway_that_dies_under_load_is_noticed(told: Bare, tmp_path: Path) -> None:
    gateway, before = Gateway("--upstream", told.url), len(told.events("request"))

    def kill() -> None:
        within(60, lambda: len(told.events("request")) > before + 20)
        gateway.process.kill()

    threading.Thread(target=kill).start()
    done = minitron(
        "bench", "--arrival", "closed", "--concurrency", "2", "--requests", "4000", "--duration", "250",
        "--input-tokens", "16", "--output-tokens", "8", "--url", gateway.document["url"], "--tokenizer", SMALL_MODEL,
        "--output", tmp_path / "run", check=False,
    )  # fmt: skip
    gateway.process.communicate()
    assert done.returncode == 7 and "the server is gone" in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["outcomes"]["ok"] >= 1
