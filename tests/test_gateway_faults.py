"""What a gateway does when something is wrong: with the request, its client, a server behind it, or itself.

The server is ``bare_triton`` with the small Minitron's tokenizer: it reads the prompt back and does what that says.
Statuses and the error object are those of OpenAI's API reference; the texts of tokens are the tokenizer's own decode.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bare_process import Bare, prompt, unused_port
from conftest import SMALL_MODEL, minitron
from gateway_process import Gateway, within

pytestmark = pytest.mark.slow

QUEUE_FULL = "Maximum queue size of 4 has been reached, please try again later"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    one = Bare(tmp_path_factory.mktemp("bare"), "--tokenizer", str(SMALL_MODEL))
    yield one
    one.end()


@pytest.fixture(scope="module")
def gateway(upstream: Bare) -> Iterator[Gateway]:
    one = Gateway("--upstream", upstream.url, "--max-body", "20000", "--max-prompts", "8", "--max-streams", "16")
    yield one
    assert one.end()[0] == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Gateway]]:
    """Starts gateways for one test."""
    started: list[Gateway] = []

    def one(*flags: str | Path) -> Gateway:
        started.append(Gateway(*flags))
        return started[-1]

    yield one
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.kill()
            gateway.process.communicate()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Bare]]:
    """Two servers, each with its own notes."""
    both = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        both.append(Bare(tmp_path / name, "--tokenizer", str(SMALL_MODEL)))
    yield both
    for one in both:
        one.end()


def text(count: int, first: int = 300) -> str:
    """The text of ids in a row behind some text."""
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    lead = tokenizer.encode("x", add_special_tokens=False).ids
    return str(tokenizer.decode([*lead, *range(first, first + count)])).removeprefix("x")


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"[]", 400, "object"),
        (b'{"model": "minitron"}', 400, "prompt: Field required"),
        (b'{"model": "minitron", "prompt": "\\ud800"}', 400, "Invalid JSON"),
        ({"prompt": 5}, 400, "prompt: must be a text, a list of token ids, or a list of either"),
        ({"prompt": []}, 400, "prompt: must be a text"),
        ({"prompt": ["x", [1]]}, 400, "prompt: must be a text"),
        ({"prompt": [True]}, 400, "prompt: must be a text"),
        ({"prompt": [5, 1024]}, 400, "token id 1024, and ids go from 0 to 1023"),
        ({"prompt": [-1]}, 400, "token id -1"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "x" * 15_000}, 400, "the engine takes at most 2000"),
        ({"prompt": "x" * 30_000}, 413, "more than the 20000 bytes"),
        ({"model": "gpt-5"}, 404, "the model 'gpt-5' does not exist; 'minitron' does"),
        ({"max_token": 5}, 400, "max_token: is no parameter of this endpoint"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 2.5}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": 2**40}, 400, "max_tokens"),
        ({"max_tokens": 30_000}, 400, "more than the 20000"),
        ({"temperature": -1}, 400, "temperature"),
        (b'{"model": "minitron", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"n": 9}, 400, "at most 8"),
        ({"n": 3, "best_of": 2}, 400, "best_of: 2 is less than n (3)"),
        ({"best_of": 3, "stream": True}, 400, "cannot be streamed"),
        ({"prompt": ["x"] * 9}, 400, "at most 8"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"stop": ""}, 400, "a stop text is empty"),
        ({"logit_bias": {"x": 1}}, 400, "'x' is no token id"),
        ({"logit_bias": {"5000": 1}}, 400, "token id 5000"),
        ({"min_p": 0.1}, 400, "min_p: tensorrt_llm has no such input"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"logprobs": 5}, 400, "logprobs: tensorrt_llm gives the log prob of the chosen token alone"),
        ({"logprobs": 1}, 400, "logprobs: tensorrt_llm gives"),  # what is sampled need not be the likeliest
        ({"echo": True, "logprobs": 0}, 400, "gather_context_logits"),  # which this server's engine is told not to have
        ({"echo": True, "logprobs": 5}, 400, "logprobs: tensorrt_llm gives"),  # of generated tokens not even then
        ({"stream_options": {"include_usage": True}}, 400, "only with stream=true"),
    ],
)
def test_a_wrong_request_is_refused_in_openai_s_shape(gateway: Gateway, body: Any, status: int, told: str) -> None:
    asked = body if isinstance(body, bytes) else {"model": "minitron", "prompt": "x", **body}
    found, document, _ = gateway.ask("/v1/completions", asked)
    assert found == status
    assert set(document) == {"error"} and set(document["error"]) == {"message", "type", "param", "code"}
    assert told in document["error"]["message"]
    assert document["error"]["type"] == "invalid_request_error"


def test_a_body_without_a_length_is_measured_too(gateway: Gateway) -> None:
    connection = gateway.connect()
    connection.request("POST", "/v1/completions", iter([b" " * 15_000] * 2), encode_chunked=True,
                       headers={"transfer-encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()


def test_paths_and_methods_that_are_not_there(gateway: Gateway) -> None:
    assert gateway.get("/v1/embeddings")[0] == 404
    assert gateway.get("/v1/completions")[0] == 405
    assert gateway.get("/v1/models/other")[1]["error"]["code"] == "model_not_found"
    assert gateway.get("/v1/models/minitron")[1] == gateway.get("/v1/models")[1]["data"][0]


def test_chat_without_a_template_names_the_endpoint_that_works(gateway: Gateway) -> None:
    asked = {"model": "minitron", "messages": [{"role": "user", "content": "Hello"}]}
    status, document, _ = gateway.ask("/v1/chat/completions", asked)
    assert status == 400
    assert "no chat template" in document["error"]["message"] and "/v1/completions" in document["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (QUEUE_FULL, 429, "queue is full"),
        ("Executor failed process requestId 7 due to the following error: top_p is 7: it must be from 0 to 1", 400,
         "top_p is 7: it must be from 0 to 1"),
        ("Executor failed process requestId 7 due to the following error: out of luck", 500,
         "the engine failed: out of luck"),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", 503, "no engine"),
    ],
)  # fmt: skip
def test_an_engine_s_error_before_the_first_token_has_a_status(
    start_bare: Callable[..., Bare], start: Callable[..., Gateway], error: str, status: int, told: str
) -> None:
    gateway = start("--upstream", start_bare("--tokenizer", str(SMALL_MODEL)).url)
    for stream in (False, True):
        assert within(10, lambda: gateway.get("/health/ready")[0] == 200)
        asked = {"model": "minitron", "prompt": prompt(error=error), "stream": stream}
        found, document, headers = gateway.ask("/v1/completions", asked)
        assert found == status and told in document["error"]["message"]
        assert (headers["retry-after"] is not None) is (status in (429, 503))


def test_an_error_behind_the_first_token_is_an_event_and_no_done(gateway: Gateway) -> None:
    with gateway.stream(prompt(error="it broke", error_after=3), max_tokens=9) as stream:
        found = list(stream)  # which fails where [DONE] comes, or no error
    assert [name for name, _ in found][-1] == "error"
    assert "it broke" in found[-1][1]["error"]["message"]
    assert "".join(one["choices"][0]["text"] for name, one in found if not name) == text(3)
    whole = gateway.refusal(prompt(error="it broke", error_after=3), stop="zz")  # read as a stream, for the stop text
    assert whole == (500, "the engine failed: it broke")


def test_a_stream_that_ends_too_early_is_no_answer(gateway: Gateway) -> None:
    status, message = gateway.refusal(prompt(tokens=2, unfinished=True))
    assert status == 500 and "before its last response" in message


def test_log_probs_of_the_wrong_length_are_never_sent(gateway: Gateway) -> None:
    status, message = gateway.refusal(prompt(tokens=3, log_probs=2), logprobs=0)
    assert status == 500 and "2 log probs for 3 tokens" in message
    assert gateway.refusal(prompt(tokens=3, log_probs=2), logprobs=0, stream=True)[0] == 500


def test_logits_of_another_length_than_the_prompt_are_never_sent(
    start_bare: Callable[..., Bare], start: Callable[..., Gateway]
) -> None:
    server = start_bare("--tokenizer", str(SMALL_MODEL), "--context-logits", "FP32")
    gateway = start("--upstream", server.url)
    asked: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 1}
    assert gateway.complete(prompt(tokens=1), **asked)["choices"][0]["logprobs"]["token_logprobs"][0] is None
    # Who scores takes the last entry off (lm-eval's openai_completions.py), so no end token may take its place.
    gateway.complete(prompt(tokens=1), **asked | {"max_tokens": 2})
    assert ["end_id" in one["inputs"] for one in server.events("request")] == [False, True]
    for rows in (0, 5):
        for stream in (False, True):
            status, message = gateway.refusal(prompt(tokens=1, context_rows=rows), stream=stream, **asked)
            assert status == 500 and f"the engine gave logits of shape [1, {rows}, 1024]" in message


def test_every_choice_s_tokens_are_counted_and_none_after_a_stop_string(gateway: Gateway) -> None:
    document = gateway.complete(prompt(tokens=8, per_response=8), max_tokens=8, n=3)
    assert document["usage"]["completion_tokens"] == 24
    third = text(3).removeprefix(text(2))
    whole = gateway.complete(prompt(tokens=8, per_response=8), max_tokens=8, stop=third)
    assert whole["choices"][0]["text"] == text(2) and whole["usage"]["completion_tokens"] == 3


def test_a_client_that_leaves_stops_its_request_alone(upstream: Bare, gateway: Gateway) -> None:
    stopped, cancelled = len(upstream.events("stop")), len(upstream.events("cancel"))
    left = gateway.metric("minitron_gateway_clients_left_total")
    other: list[str] = []
    staying = threading.Thread(target=lambda: other.extend(gateway.texts(prompt(tokens=80, interval_ms=20),
                                                                         max_tokens=80)))  # fmt: skip
    staying.start()
    with gateway.stream(prompt(tokens=9000, interval_ms=5), max_tokens=9000) as stream:
        next(stream)
    assert within(20, lambda: len(upstream.events("stop")) > stopped)
    asked = {"model": "minitron", "prompt": prompt(tokens=9000, interval_ms=5), "max_tokens": 9000}
    connection = gateway.connect()  # a whole answer's client leaves as well
    connection.request("POST", "/v1/completions", json.dumps(asked))
    assert within(20, lambda: gateway.metric("minitron_gateway_streams") >= 1)
    connection.close()
    assert within(20, lambda: len(upstream.events("stop")) > stopped + 1)
    staying.join()
    assert "".join(other) == text(80)
    assert len(upstream.events("cancel")) == cancelled  # a cancelled gRPC stream can end Triton
    assert gateway.metric("minitron_gateway_clients_left_total") == left + 2


def test_too_many_streams_are_told_to_wait(gateway: Gateway) -> None:
    with gateway.stream(prompt(tokens=9000, interval_ms=5), max_tokens=9000, n=8) as one:
        next(one)
        with gateway.stream(prompt(tokens=9000, interval_ms=5), max_tokens=9000, n=8) as two:
            next(two)
            status, document, headers = gateway.ask("/v1/completions", {"model": "minitron", "prompt": "x"})
            assert status == 429 and headers["retry-after"] == "1"
            assert document["error"]["type"] == "rate_limit_error"
    assert within(20, lambda: gateway.metric("minitron_gateway_streams") == 0)
    assert gateway.complete(prompt(tokens=2))


@pytest.mark.parametrize(("workers", "most"), [("1", 4), ("2", 2)])
def test_what_can_never_fit_is_wrong_and_not_told_to_wait(
    upstream: Bare, start: Callable[..., Gateway], workers: str, most: int
) -> None:
    gateway = start("--upstream", upstream.url, "--workers", workers, "--max-streams", "4")
    for prompts, n in ((most + 1, 1), (1, most + 1), (most, 2)):
        asked = {"model": "minitron", "prompt": [prompt(tokens=2)] * prompts, "n": n}
        status, document, headers = gateway.ask("/v1/completions", asked)
        assert status == 400 and headers["retry-after"] is None
        assert f"{prompts * n} sequences" in document["error"]["message"]
        assert f"at most {most} may be" in document["error"]["message"]
        assert document["error"]["param"] == ("prompt" if prompts > 1 else "n")
    assert len(gateway.complete([prompt(tokens=2)] * most)["choices"]) == most


def test_a_slow_reader_holds_nobody_and_gets_everything(gateway: Gateway) -> None:
    """200 KB of events that nobody reads, behind which the socket's buffers are full, beside a stream that is read."""
    host, port = gateway.address.split(":")
    body = json.dumps({"model": "minitron", "prompt": prompt(tokens=600, interval_ms=0, first_id=300), "n": 8,
                       "max_tokens": 600, "stream": True})  # fmt: skip
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    slow.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    assert within(20, lambda: gateway.metric("minitron_gateway_streams") == 8)
    assert "".join(gateway.texts(prompt(tokens=200), max_tokens=200)) == text(200)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(65536)
    slow.close()
    assert received.count(b'"finish_reason": "length"') == 8


def test_keys_are_demanded_for_what_costs_and_not_for_health(
    upstream: Bare, start: Callable[..., Gateway], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("a-key-of-sixteen-letters\nanother-key-of-letters\n")
    gateway = start("--upstream", upstream.url, "--api-key-file", tmp_path / "keys")
    asked = {"model": "minitron", "prompt": prompt(tokens=2)}
    for wrong in (
        {},
        {"authorization": "Bearer a-key-of-sixteen"},
        {"authorization": "Basic a-key-of-sixteen-letters"},
    ):
        status, document, headers = gateway.ask("/v1/completions", asked, **wrong)
        assert status == 401 and document["error"]["code"] == "invalid_api_key"
        assert headers["www-authenticate"] == "Bearer"  # RFC 9110, 15.5.2: a 401 has it
        assert gateway.get("/v1/models", **wrong)[0] == 401
        connection = gateway.connect()
        connection.request("GET", "/v1/models/minitron", headers=wrong)
        assert connection.getresponse().getheader("www-authenticate") == "Bearer"
        connection.close()
    for key in ("a-key-of-sixteen-letters", "another-key-of-letters"):
        assert gateway.ask("/v1/completions", asked, authorization=f"Bearer {key}")[0] == 200
    assert gateway.get("/health")[0] == gateway.get("/health/ready")[0] == gateway.get("/metrics")[0] == 200


def test_https_in_front_and_mutual_tls_behind(
    start_bare: Callable[..., Bare], start: Callable[..., Gateway], certificates: Path, tmp_path: Path
) -> None:
    server = start_bare("--tokenizer", str(SMALL_MODEL), "--tls", str(certificates), "--mutual")
    (tmp_path / "key").write_text("the-key-of-the-server\n")
    ours = ("--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    theirs = ("--upstream-ca", certificates / "ca.crt", "--upstream-cert", certificates / "client.crt",
              "--upstream-key", certificates / "client.key", "--upstream-api-key-file", tmp_path / "key")  # fmt: skip
    gateway = start("--upstream", server.url, *ours, *theirs)
    assert gateway.document["url"].startswith("https://")
    assert "".join(gateway.texts(prompt(tokens=4))) == text(4)
    (noted,) = server.events("request")
    assert noted["metadata"]["triton-grpc-protocol-api-key"] == "the-key-of-the-server"


def test_the_stream_interval_gathers_tokens(upstream: Bare, start: Callable[..., Gateway]) -> None:
    gateway = start("--upstream", upstream.url, "--stream-interval", "8")
    found = [one for one in gateway.texts(prompt(tokens=33, interval_ms=5), max_tokens=33) if one]
    assert "".join(found) == text(33)
    assert len(found) <= 5  # the first token at once, the others by eights at least


def test_the_one_with_less_to_do_is_asked(servers: list[Bare], start: Callable[..., Gateway]) -> None:
    gateway = start(*(word for one in servers for word in ("--upstream", one.url)))
    with gateway.stream(prompt(tokens=9000, interval_ms=5), max_tokens=9000) as busy:
        next(busy)
        counts = [len(one.events("request")) for one in servers]
        assert sorted(counts) == [0, 1]
        for _ in range(3):
            gateway.complete(prompt(tokens=2), max_tokens=2)
        idle = servers[counts.index(0)]
        assert len(idle.events("request")) == 3
    assert within(20, lambda: gateway.metric("minitron_gateway_streams") == 0)
    for _ in range(4):  # equals take turns
        gateway.complete(prompt(tokens=2), max_tokens=2)
    assert sorted(len(one.events("request")) for one in servers) == [3, 5]


def test_what_has_not_begun_is_sent_elsewhere_and_what_has_is_not(
    servers: list[Bare], start: Callable[..., Gateway]
) -> None:
    gateway = start(*(word for one in servers for word in ("--upstream", one.url)))
    with gateway.stream(prompt(tokens=50, interval_ms=5, die_after=4), max_tokens=50) as stream:
        parts = list(stream)
    assert parts[-1][0] == "error"
    assert "the server that was answering was lost" in parts[-1][1]["error"]["message"]
    assert gateway.get("/health/ready")[0] == 200  # the other one is there
    assert "".join(one["choices"][0]["text"] for name, one in parts if not name) == text(4)
    assert sum(len(one.events("request")) for one in servers) == 1
    assert within(30, lambda: any(one.process.poll() is not None for one in servers))
    dead = next(one for one in servers if one.process.poll() is not None)
    alive = next(one for one in servers if one is not dead)
    for _ in range(3):
        assert gateway.complete(prompt(tokens=3), max_tokens=3)["choices"][0]["text"] == text(3)
    assert len(alive.events("request")) == 3
    dead.start()
    ready = f'minitron_gateway_upstream_ready{{upstream="{dead.url}"}}'
    assert within(30, lambda: gateway.metric(ready) == 1)
    before = len(dead.events("request"))
    for _ in range(2):
        gateway.complete(prompt(tokens=3), max_tokens=3)
    assert len(dead.events("request")) == before + 1
    # A whole answer with a stop text is a stream behind the gateway: it can break in the middle as well.
    status, message = gateway.refusal(prompt(tokens=50, interval_ms=5, die_after=4), max_tokens=50, stop="zz")
    assert status == 503 and "the server that was answering was lost" in message


def test_a_refusal_is_tried_once_more_elsewhere_and_a_wrong_request_is_not(
    servers: list[Bare], start: Callable[..., Gateway]
) -> None:
    gateway = start(*(word for one in servers for word in ("--upstream", one.url)))
    assert gateway.refusal(prompt(tokens=3, reject_times=1), max_tokens=3)[0] == 429  # by both
    assert [len(one.events("request")) for one in servers] == [1, 1]
    assert gateway.complete(prompt(tokens=3, reject_times=1), max_tokens=3)["choices"][0]["text"] == text(3)
    assert gateway.metric("minitron_gateway_retries_total") == 1
    before = sum(len(one.events("request")) for one in servers)
    assert gateway.refusal(prompt(error="top_p is 7: it must be from 0 to 1"))[0] == 400
    assert sum(len(one.events("request")) for one in servers) == before + 1


def test_without_a_ready_server_it_is_not_ready_and_says_503(
    start_bare: Callable[..., Bare], start: Callable[..., Gateway]
) -> None:
    server = start_bare("--tokenizer", str(SMALL_MODEL))
    gateway = start("--upstream", server.url)
    assert gateway.get("/health/ready")[0] == 200
    server.end()
    status, document, headers = gateway.ask("/v1/completions", {"model": "minitron", "prompt": "x"})
    assert status == 503 and headers["retry-after"] == "1"
    assert document["error"]["type"] == "service_unavailable"
    assert gateway.get("/health/ready")[0] == 503 and gateway.get("/health")[0] == 200
    server.start()
    assert within(30, lambda: gateway.get("/health/ready")[0] == 200)
    assert gateway.complete(prompt(tokens=2))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_drain_lets_accepted_streams_end_whole_and_takes_no_new_one(
    upstream: Bare, start: Callable[..., Gateway], workers: str
) -> None:
    gateway = start("--upstream", upstream.url, "--workers", workers)
    with gateway.stream(prompt(tokens=300, interval_ms=10), max_tokens=300) as stream:
        first = next(stream)
        gateway.process.send_signal(signal.SIGTERM)
        if workers == "1":  # of several workers only those with streams stay to the end
            assert within(10, lambda: gateway.get("/health/ready")[0] == 503)
            status, document, headers = gateway.ask("/v1/completions", {"model": "minitron", "prompt": "x"})
            assert status == 503 and headers["retry-after"] == "1"
            assert "stopping" in document["error"]["message"]
        rest = [one for _, one in stream]  # which fails without [DONE]
    assert "".join(one["choices"][0]["text"] for one in [first[1], *rest]) == text(300)
    code, said = gateway.end()
    assert code == 0 and "draining" in said and "Traceback" not in said
    assert not upstream.events("cancel")


def test_a_stream_that_outlives_the_drain_is_cut_off_and_stopped(
    start_bare: Callable[..., Bare], start: Callable[..., Gateway]
) -> None:
    server = start_bare("--tokenizer", str(SMALL_MODEL))
    gateway = start("--upstream", server.url, "--drain-timeout", "0.5")
    with gateway.stream(prompt(tokens=9000, interval_ms=20), max_tokens=9000) as stream:
        code, said = gateway.end()
        found = list(stream)
    assert found[-1][0] == "error" and "stopped before the end" in found[-1][1]["error"]["message"]
    assert code == 0 and "Traceback" not in said
    assert server.events("stop")


def test_workers_are_counted_together_and_started_again(upstream: Bare, start: Callable[..., Gateway]) -> None:
    gateway = start("--upstream", upstream.url, "--workers", "2")
    for _ in range(6):
        gateway.complete(prompt(tokens=2), max_tokens=2)
    line = 'minitron_gateway_requests_total{endpoint="completions",status="200"}'
    assert within(10, lambda: gateway.metric(line) == 6)  # a worker counts behind the last byte that it sends
    import psutil

    def workers() -> list[Any]:
        children = psutil.Process(gateway.process.pid).children()
        alive = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
        return [one for one in alive if "spawn_main" in " ".join(one.cmdline())]

    first = workers()
    assert len(first) == 2
    first[0].kill()
    assert within(60, lambda: len(workers()) == 2 and first[0] not in workers())
    time.sleep(0.1)
    assert gateway.metric(line) == 6  # what the dead one counted is kept
    assert gateway.end()[0] == 0


def test_what_cannot_be_is_said_in_one_line(upstream: Bare, tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{unused_port()}"
    listen = ("--listen", "127.0.0.1:0")
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "short").chmod(0o600)
    empty = tmp_path / "empty"
    empty.touch()
    for words, code, told in (
        (("--upstream", nobody, "--wait", "0"), 10, "check that the server runs"),
        (("--upstream", upstream.url, "--workers", "0"), 2, "--workers 0 must be 1 or more"),
        (("--upstream", upstream.url, "--max-prompts", "0"), 2, "--max-prompts 0 must be 1 or more"),
        (
            ("--upstream", upstream.url, "--max-prompts", "5", "--max-streams", "8", "--workers", "2"),
            2,
            "a worker's share of --max-streams 8, which is 4: raise --max-streams to 10, or lower",
        ),
        (("--upstream", upstream.url, "--stream-interval", "5s"), 2, "neither a number of tokens"),
        (("--upstream", upstream.url, "--tokenizer", tmp_path / "none"), 3, "--tokenizer names"),
        (("--upstream", upstream.url, "--repository", tmp_path), 3, "config.pbtxt"),
        (("--upstream", upstream.url, "--tls-cert", tmp_path / "x"), 2, "both --tls-cert and --tls-key"),
        (("--upstream", upstream.url, "--api-key-file", tmp_path / "short"), 3, "less than 16 characters"),
        (("--upstream", upstream.url, "--tls-cert", empty, "--tls-key", empty), 3, "holds no certificate in PEM"),
        (("--upstream", upstream.url, "--upstream-ca", empty), 3, "holds no certificate in PEM"),
        (("--upstream", upstream.url, "--upstream-api-key-file", empty), 3, "holds no API key"),
        (("--upstream", upstream.url, "--listen", upstream.url), 5, "cannot be listened on"),
        (("--upstream", upstream.url, "--listen", upstream.url, "--workers", "2"), 5, "cannot be listened on"),
        (("--listen", "8080"), 2, "is no HOST:PORT"),
    ):
        done = minitron("gateway", *(() if "--listen" in words else listen), *words, check=False)
        assert done.returncode == code, done.stderr
        assert told in done.stderr and len(done.stderr.splitlines()) == 1
