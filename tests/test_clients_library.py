"""The gRPC library against a bare process that speaks Triton's protocol (``bare_triton``): refusals, faults, cancels.

Expected tensor names and shapes are the contract's; expected texts and counts follow from what each prompt asks for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bare_process import Bare, prompt, unused_port, words
from conftest import ROOMS, ROOT
from minitron.errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InputError,
    InvalidRequest,
    NotReady,
    Rejected,
    StreamBroken,
    UsageError,
)
from minitron_client.client import ApiKey, Client, Endpoint, Request, Retry, Tls


@pytest.fixture
def client(bare: Bare) -> Iterator[Client]:
    with Client(bare.url) as client:
        yield client


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_streams_text_with_counts_and_times(client: Client, model: str) -> None:
    with client.stream(prompt(tokens=5, interval_ms=20), model=model, max_tokens=10) as stream:
        chunks = list(stream)
    answer = stream.response
    assert "".join(chunk.text for chunk in chunks) == answer.text == words(5)
    assert answer.token_count == sum(chunk.token_count or 0 for chunk in chunks) == 5
    assert answer.finish_reason == chunks[-1].finish_reason == "stop"
    times = [chunk.received_ns for chunk in chunks if chunk.token_count]
    assert answer.timing.ttft_ns == times[0] - answer.timing.sent_ns >= 20e6
    assert answer.timing.tpot_ns == (times[4] - times[0]) / 4
    assert len(answer.timing.itl_ns) == 4


def test_finish_reason_is_length_at_max_tokens(client: Client) -> None:
    assert client.generate(prompt(tokens=50), max_tokens=6).finish_reason == "length"


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls", "ensemble"])
@pytest.mark.parametrize(("end", "reason"), [(0, "stop"), (3, "stop"), (5, "stop"), (6, "length"), (7, "length")])
def test_an_end_token_is_no_output_and_its_answer_stopped(client: Client, model: str, end: int, reason: str) -> None:
    """Tokens are 0, 1, 2 and so on: an end at place n leaves n tokens, of six at most; with six, nobody knows."""
    prompted: dict[str, Any] = {"input_ids": [5]} if model == "tensorrt_llm" else {"prompt": prompt(tokens=99)}
    request = Request(**prompted, max_tokens=6, end_id=end)
    stream = client.stream(request, model=model)
    chunks = list(stream)
    for answer in (stream.response, client.generate(request, model=model)):
        assert (answer.token_count, answer.finish_reason) == (min(end, 6), reason)
        assert answer.token_ids == (tuple(range(min(end, 6))) if model == "tensorrt_llm" else ())
        assert answer.text == ("" if model == "tensorrt_llm" else words(min(end, 6)))
    assert chunks[-1].finish_reason == reason


def test_whole_answer_comes_in_one_response_and_has_no_first_token_time(client: Client, bare: Bare) -> None:
    answer = client.generate(prompt(tokens=5), max_tokens=10)
    assert (answer.text, answer.token_count, answer.finish_reason) == (words(5), 5, "stop")
    assert answer.timing.ttft_ns is None and answer.timing.tpot_ns is None and answer.timing.e2e_ns
    assert "stream" not in bare.events("request", answer.request_id)[0]["inputs"]


def test_token_level_access(client: Client) -> None:
    request = Request(input_ids=[5, 6, 7], max_tokens=4, stop_ids=[[1, 2], [3]], return_log_probs=True)
    stream = client.stream(request, model="tensorrt_llm")
    assert [chunk.token_ids for chunk in stream if chunk.token_count] == [(0,), (1,), (2,), (3,)]
    answer = stream.response
    assert answer.token_ids == (0, 1, 2, 3) and answer.input_token_count == 3 and answer.text == ""
    assert answer.outputs[0].log_probs == (-0.5,) * 4 and answer.outputs[0].cumulative_log_prob == -2.0


def test_llmapi_text_becomes_deltas_and_nothing_is_counted(client: Client) -> None:
    chunks = list(stream := client.stream(prompt(tokens=4), model="llmapi", max_tokens=9))
    assert [chunk.text for chunk in chunks] == [" w0", " w1", " w2", " w3", ""]
    answer = stream.response
    assert (answer.text, answer.token_count, answer.finish_reason) == (words(4), None, "stop")
    assert answer.timing.ttft_ns is None and answer.timing.itl_ns == [] and answer.timing.e2e_ns


def test_without_counts_there_are_no_token_metrics(client: Client) -> None:
    list(stream := client.stream(prompt(tokens=4, counts=False), max_tokens=9))
    answer = stream.response
    assert answer.text == words(4)
    assert (answer.token_count, answer.finish_reason, answer.input_token_count) == (None, None, None)
    assert answer.timing.ttft_ns is None and answer.timing.tpot_ns is None


def test_every_setting_reaches_its_tensor(client: Client, bare: Bare) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 3, "min_tokens": 3, "end_id": 7, "pad_id": 8, "temperature": 0.5, "top_k": 4, "top_p": 0.25,
        "seed": 2**64 - 1, "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.5,
        "length_penalty": 2.0, "num_return_sequences": 1, "stop_words": ["a", "ü b"], "bad_words": ["c", "d"],
    }  # fmt: skip
    got = bare.events("request", client.generate("Hi", **settings, return_log_probs=True).request_id)[0]
    always = {"exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens", "return_log_probs"}
    assert got["inputs"] == settings | {"text_input": "Hi"} | dict.fromkeys(always, True)
    assert got["shapes"]["stop_words"] == [1, 2] and got["shapes"]["max_tokens"] == [1, 1]
    ids: dict[str, Any] = {"stop_ids": [[1, 2], [3]], "bad_ids": [[9]], "top_p_decay": 0.5, "top_p_reset_id": 2,
                           "beam_search_diversity_rate": 0.5, "top_k": 0}  # fmt: skip
    answer = client.generate(Request(input_ids=[5, 6], max_tokens=2, **ids), model="tensorrt_llm")
    got = bare.events("request", answer.request_id)[0]
    assert got["inputs"]["stop_words_list"] == [1, 2, 3, 2, 3, -1] and got["shapes"]["stop_words_list"] == [1, 2, 3]
    assert got["inputs"]["bad_words_list"] == [9, 1] and got["inputs"]["runtime_top_k"] == 0
    assert got["inputs"]["runtime_top_p_decay"] == 0.5 and got["inputs"]["input_lengths"] == 2


def test_ignore_end_is_minus_one_for_text_and_nothing_for_ids(client: Client, bare: Bare) -> None:
    text = client.generate("Hi", max_tokens=2, ignore_end=True)
    ids = client.generate(Request(input_ids=[1], max_tokens=2, ignore_end=True), model="tensorrt_llm")
    assert bare.events("request", text.request_id)[0]["inputs"]["end_id"] == -1
    assert "end_id" not in bare.events("request", ids.request_id)[0]["inputs"]
    with pytest.raises(InvalidRequest, match="no input for end_id"):
        client.generate("Hi", model="llmapi", ignore_end=True)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"), ({"seed": 2**64}, "seed"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stop_words": "word"}, "stop_words"), ({"stop_words": [""]}, "stop_words"), ({"nonsense": 1}, "nonsense"),
        ({"ignore_end": True, "end_id": 2}, "ignore_end"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"input_ids": [1]}, "either"), ({"stop_ids": [[1]]}, "stop_ids"), ({"embedding_bias": {"a": 1e999}}, "bias"),
    ],
)  # fmt: skip
def test_wrong_requests_are_not_sent(client: Client, bare: Bare, options: dict[str, Any], part: str) -> None:
    before = len(bare.events("request"))
    with pytest.raises(InvalidRequest, match=part):
        client.generate("Hi", **options)
    assert len(bare.events("request")) == before


@pytest.mark.parametrize("asked", [Request(""), Request("\ud800"), Request(input_ids=[]), Request(input_ids=[-1])])
def test_wrong_prompts_are_not_sent(client: Client, asked: Request) -> None:
    with pytest.raises(InvalidRequest, match="not sent"):
        client.generate(asked)


def test_wrong_kind_of_prompt_for_the_model(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="takes text"):
        client.generate(Request(input_ids=[1]))
    with pytest.raises(InvalidRequest, match="takes token ids"):
        client.generate("Hi", model="tensorrt_llm")
    with pytest.raises(InvalidRequest, match="beam search"):
        client.stream("Hi", beam_width=2)


# Texts as the contract has them (sections 2.1, 4.1, 4.2) or as Triton 2.51 and TensorRT-LLM say them.
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Maximum queue size of 4 has been reached, please try again later", Rejected),
        ("[request id: a] Exceeds maximum queue size", Rejected),
        ("Request timeout expired", Rejected),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", NotReady),
        ("Prompt length (900) exceeds maximum input length (256).", InvalidRequest),
        ("[request id: <id_unknown>] inference request batch-size must be <= 1 for 'x'", InvalidRequest),
        ("Executor failed process requestId 4 due to the following error: CUDA error", ClientError),
        ('Traceback (most recent call last):\n  File "/secret/model.py"\nValueError: broken', ClientError),
    ],
)
def test_errors_are_told_apart_by_their_text(bare: Bare, text: str, kind: type[ClientError]) -> None:
    with Client(bare.url, retry=Retry(attempts=1)) as client, pytest.raises(ClientError) as caught:
        list(client.stream(prompt(error=text, error_after=2)))
    assert type(caught.value) is kind and "\n" not in str(caught.value) and "/secret" not in str(caught.value)


def test_a_stream_that_ends_before_the_last_response_is_broken(client: Client) -> None:
    with pytest.raises(StreamBroken, match="before the last response"):
        list(client.stream(prompt(unfinished=True)))


def test_full_server_is_asked_again_until_the_first_token(client: Client, bare: Bare) -> None:
    asked = prompt(tokens=3, reject_times=2)
    list(stream := client.stream(asked))
    assert stream.response.text == words(3) and len(bare.events("request", stream.request_id)) == 3
    with pytest.raises(Rejected):
        client.generate(prompt(tokens=3, reject_times=9))
    stream = client.stream(prompt(tokens=8, error="Maximum queue size of 4 has been reached", error_after=2))
    with pytest.raises(Rejected):
        list(stream)
    assert len(bare.events("request", stream.request_id)) == 1  # tokens had come: never twice


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
@pytest.mark.parametrize("silent", [False, True])
def test_deadline(client: Client, bare: Bare, model: str, silent: bool) -> None:
    client.served_model(model)  # a busy machine would spend the deadline on the question of what the model is
    started = time.monotonic()
    stream = client.stream(prompt(tokens=10_000, silent=silent), max_tokens=10_000, model=model, deadline_s=0.3)
    with pytest.raises(DeadlineExceeded):
        list(stream)
    assert 0.25 < time.monotonic() - started < 3
    bare.wait_for("stop" if model == "ensemble" else "cancel", stream.request_id)


@pytest.mark.parametrize("leave", ["break", "with", "cancel", "close"])
def test_leaving_the_iterator_cancels(client: Client, bare: Bare, leave: str) -> None:
    stream = client.stream(prompt(tokens=10_000), max_tokens=10_000)
    request_id = stream.request_id
    next(stream)
    if leave == "with":
        with stream:
            next(stream)
    elif leave == "break":
        del stream
    elif leave == "close":
        stream.close()
        assert list(stream) == []
    else:
        stream.cancel()
        with pytest.raises(Cancelled):
            list(stream)
    bare.wait_for("cancel", request_id)


@pytest.mark.parametrize("version", ["2.51.0", "2.67.0"])
def test_an_ensemble_is_stopped_and_never_cancelled(start_bare: Callable[..., Bare], version: str) -> None:
    """Before 2.67 a cancel leaves its request behind, and no version bears cancelled streams well."""
    server = start_bare("--version", version)
    with Client(server.url) as client, client.stream(prompt(tokens=10_000), max_tokens=999, model="ensemble") as stream:
        next(stream)
    server.wait_for("end", stream.request_id)
    assert server.events("stop", stream.request_id)[0]["model"] == "tensorrt_llm"
    assert not server.events("cancel", stream.request_id)


def test_cancel_from_another_thread_ends_a_silent_request(client: Client) -> None:
    stream = client.stream(prompt(silent=True))
    threading.Timer(0.1, stream.cancel).start()
    with pytest.raises(Cancelled):
        next(stream)


def test_close_from_another_thread_ends_a_silent_request(client: Client) -> None:
    for model in ("tensorrt_llm_bls", "ensemble"):
        stream = client.stream(prompt(tokens=10_000, interval_ms=200), max_tokens=10_000, model=model)
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(Cancelled):
            list(stream)
        assert list(stream) == []


def test_inside_a_running_event_loop(client: Client) -> None:
    async def main() -> str:
        return client.generate(prompt(tokens=2)).text

    assert asyncio.run(main()) == words(2)


def test_a_closed_client_says_so(bare: Bare) -> None:
    with Client(bare.url) as client:
        client.generate(prompt(tokens=1))
    with pytest.raises(UsageError, match="closed"):
        client.generate(prompt(tokens=1))


def test_ctrl_c_ends_a_silent_request_and_the_client_lives_on(client: Client, bare: Bare) -> None:
    stream = client.stream(prompt(silent=True))
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()  # whom the kernel chooses, too
    with pytest.raises(KeyboardInterrupt), stream:
        next(stream)
    bare.wait_for("cancel", stream.request_id)
    assert client.generate(prompt(tokens=2)).text == words(2)


FORKS = """
import os, sys
from minitron.errors import ClientError
from minitron_client import Client

url, asked, endless = sys.argv[1:]

def child(ask):
    if not (pid := os.fork()):
        try:
            said = ask()
        except ClientError as error:
            said = str(error)
        os.write(1, said.encode() + b"\\n")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def anew():
    with Client(url, deadline_s=20) as other:
        return other.generate(asked).text

with Client(url, deadline_s=20) as client:
    child(lambda: client.generate(asked).text)
    client.generate(asked)
    child(lambda: client.generate(asked).text)
    child(anew)
    print(client.generate(asked).text, flush=True)
    with client.stream(endless, max_tokens=9999) as stream:
        next(stream)
        child(anew)
        child(lambda: next(stream).text)
        print(next(stream).text, flush=True)
child(anew)
"""


def test_processes_may_fork(bare: Bare) -> None:
    """Idle connections are no hindrance; in the middle of an answer a child gets an error, and its parent goes on."""
    program = [sys.executable, "-c", FORKS, bare.url, prompt(tokens=3), prompt(tokens=10_000)]
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    done = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": rooms}, capture_output=True, text=True, timeout=120, check=True
    )
    said = done.stdout.splitlines()
    assert said[:4] == [words(3)] * 4 and said[6:] == [" w1", words(3)]
    assert "forked while a client was connected" in said[4] and "another process's" in said[5]
    assert done.stderr == ""


def test_the_front_is_found(start_bare: Callable[..., Bare]) -> None:
    with Client(start_bare("--models", "ensemble,tensorrt_llm").url) as client:
        assert client.generate("Hi").model == "ensemble"
        with pytest.raises(NotReady, match="unknown model"):
            client.generate("Hi", model="nope")


def test_questions(client: Client) -> None:
    assert client.is_live() and client.is_ready() and client.is_model_ready("ensemble")
    assert not client.is_model_ready("nope")
    assert client.metadata()["version"] == "2.51.0"
    assert client.config()["name"] == client.model_metadata()["name"] == "tensorrt_llm_bls"
    assert client.statistics("ensemble")[0]["inference_count"] == "3"


def test_batch_keeps_the_order(client: Client) -> None:
    asked = [prompt(tokens=n, interval_ms=5) for n in (9, 1, 5, 3)]
    assert [one.token_count for one in client.generate_batch(asked, concurrency=3)] == [9, 1, 5, 3]
    with pytest.raises(Rejected):
        client.generate_batch([*asked, prompt(reject_times=9)])


def test_64_streams_in_threads_on_one_client(client: Client) -> None:
    texts: dict[int, str] = {}

    def read(number: int) -> None:
        texts[number] = "".join(chunk.text for chunk in client.stream(prompt(tokens=number + 1), max_tokens=99))

    threads = [threading.Thread(target=read, args=[number]) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: words(number + 1) for number in range(64)}


def test_no_thread_or_connection_is_left_after_1000_requests(bare: Bare) -> None:
    Client(bare.url).close()
    time.sleep(0.3)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Client(bare.url) as client:
        for number in range(1000):
            stream = client.stream(prompt(tokens=2, interval_ms=0))
            if number % 10:
                assert len(list(stream)) == 4  # two tokens, the end, and the closing message
            else:
                next(stream)
                stream.close()
    time.sleep(0.3)
    assert threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files + 2


def test_server_absent() -> None:
    with Client(f"127.0.0.1:{unused_port()}", deadline_s=5) as client:
        with pytest.raises(NotReady, match="failed to connect"):
            client.generate("Hi")
        assert not client.is_live() and not client.is_ready()


def test_wrong_port_that_accepts_and_says_nothing() -> None:
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        with Client(f"127.0.0.1:{deaf.getsockname()[1]}", deadline_s=0.5) as client, pytest.raises(DeadlineExceeded):
            client.generate("Hi")
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("url", ["localhost", "http://127.0.0.1:8001", ""])
def test_wrong_url(url: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        Client(url)


@pytest.mark.parametrize("given", [{"tls": Tls()}, {"api_key": ApiKey("s3cret")}])
def test_nothing_given_beside_an_endpoint_is_overlooked(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give tls and api_key to it"):
        Client(Endpoint("127.0.0.1:1"), **given)


@pytest.mark.parametrize("seconds", [0.5, -1.0, float("nan"), float("inf"), 1e6])
def test_a_keepalive_that_cannot_be(seconds: float) -> None:
    with pytest.raises(UsageError, match="keepalive"):
        Client("127.0.0.1:1", keepalive_s=seconds)


def test_server_dies_in_the_middle_and_comes_back(start_bare: Callable[..., Bare]) -> None:
    server = start_bare()
    with Client(server.url, retry=Retry(attempts=50)) as client:  # a busy machine takes its time
        with pytest.raises(StreamBroken, match="incomplete"):
            list(client.stream(prompt(die_after=3)))
        server.process.wait()
        threading.Timer(0.2, server.start).start()
        assert client.generate(prompt(tokens=2)).text == words(2)  # asked again until it was back


def test_tls_and_mutual_tls(start_bare: Callable[..., Bare], certificates: Path) -> None:
    server = start_bare("--tls", str(certificates), "--mutual")
    ours = Tls(certificates / "ca.crt", certificates / "client.crt", certificates / "client.key")
    with Client(server.url, tls=ours) as client:
        assert client.generate("Hi").text == words(8)
    for wrong in (None, Tls(), Tls(certificates / "ca.crt")):  # plain, unknown authority, no certificate of ours
        with Client(server.url, tls=wrong, deadline_s=5) as client, pytest.raises(NotReady):
            client.generate("Hi")
    with pytest.raises(UsageError, match="both"):
        Client(server.url, tls=Tls(cert=certificates / "client.crt"))
    for broken, why in (
        (Tls(certificates / "ca.key"), r"ca\.key holds no certificate"),
        (Tls(certificates / "ca.crt", certificates / "client.crt", certificates / "server.key"), r"server\.key is not"),
    ):
        for connect in (broken.credentials, broken.context):  # gRPC's and HTTP's
            with pytest.raises(InputError, match=why):
                connect()


def test_tls_towards_a_plain_server(bare: Bare, certificates: Path) -> None:
    with (
        Client(bare.url, tls=Tls(certificates / "ca.crt"), deadline_s=5) as client,
        pytest.raises(NotReady, match="TLS"),
    ):
        client.generate("Hi")


def test_api_key_is_sent_and_not_shown(bare: Bare) -> None:
    key = ApiKey("s3cret", name="infer")
    assert "s3cret" not in repr(key)
    with Client(bare.url, api_key=key) as client:
        got = bare.events("request", client.generate("Hi").request_id)[0]
    assert got["metadata"]["triton-grpc-protocol-infer"] == "s3cret" and "triton_grpc_error" not in got["metadata"]
    with pytest.raises(UsageError):
        Client(bare.url, api_key=ApiKey("two\nlines"))
