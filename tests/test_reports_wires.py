"""A long wait is no dead line, and a dead line no long wait (sglang#19986, triton server#3089, vllm#51034).

Right is what gRPC's own guide says of pings (doc/keepalive.md, A8-client-side-keepalive): a server ends a connection
with "too_many_pings" when a third ping comes sooner after the one before than it allows while it has nothing to send,
by default 300 s; the defaults stand in ``tritonserver --help``, too. Intervals are ten times shorter here than in use,
or more: the server's by a flag of its own, the client's by its option. Server, pings and their punishment are real; the
engine is not: a model that waits as long as the prompt says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import echo_repository
from bare_process import Bare, prompt
from conftest import ROOMS, ROOT, SMALL_MODEL
from gateway_process import Gateway, events
from minitron.errors import ClientError, StreamBroken
from minitron.text import channel, engine
from minitron.text.engine import Address, EngineCallError, EngineClient
from minitron_client.bench.record import Record
from minitron_client.bench.sender import GrpcSender, serialize
from minitron_client.client import AsyncClient, Client, Endpoint
from minitron_client.client.request import Request
from minitron_triton.server import triton_flags
from serving import server as serving
from supervisor import Supervisor, tritonserver, within

pytestmark = pytest.mark.slow

ALLOWED = "grpc-http2-min-recv-ping-interval-without-data"
READY = grpc.ChannelConnectivity.READY
WAIT_S = 9
#: Late enough for pings to find a dead line first, early enough to come before the 60 s that gRPC waits untold.
DEADLINE_S = 40.0
TEXTS = [f"{number} " for number in range(3)]


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server as 'minitron serve' starts it, but for time: it takes a ping every half second."""
    repository = echo_repository.write(tmp_path_factory.mktemp("lenient") / "echo")
    with serving(repository, "--verbose", "--", f"--{ALLOWED}", "500") as document:
        yield document


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server that counts pings as Triton's default has it, which somebody may have started himself."""
    repository = echo_repository.write(tmp_path_factory.mktemp("strict") / "echo")
    with serving(repository, "--", f"--{ALLOWED}=300000") as document:
        yield document


# ---- the four ways in which this project asks a server; each gives the texts, or raises


def blocking(url: str, text: str, model: str) -> list[str]:
    with (
        Client(url, model=model, keepalive_s=1, deadline_s=DEADLINE_S) as client,
        client.stream(text, max_tokens=3) as stream,
    ):
        return [chunk.text for chunk in stream if chunk.text]


def asynchronous(url: str, text: str, model: str) -> list[str]:
    async def ask() -> list[str]:
        async with AsyncClient(Endpoint(url, keepalive_s=1), model=model, deadline_s=DEADLINE_S) as client:
            return [chunk.text async for chunk in client.stream(text, max_tokens=3) if chunk.text]

    return asyncio.run(ask())


def measuring(url: str, text: str, model: str) -> list[str]:
    """What 'load' and 'latency' send with; it notes counts and times alone."""
    with Client(url) as client:
        prepared = serialize(client.served_model(model), Request(text, max_tokens=3), "one")

    async def ask() -> Record:
        wire = GrpcSender(Endpoint(url, keepalive_s=1))
        record = await wire.send(prepared, Record(index=0, intended_ns=0), DEADLINE_S)
        await wire.close()
        return record

    record = asyncio.run(ask())
    if record.error:
        raise (StreamBroken if record.outcome == StreamBroken.__name__ else ClientError)(record.error)
    return TEXTS[: len(record.responses) - 1]  # the last one is the final flag


def of_the_text_model(url: str, text: str, model: str) -> list[str]:
    """What the text model and the gateway ask with; they ask for its readiness, too."""

    async def ask() -> list[str]:
        inputs = {"text_input": np.array([text.encode()], object), "max_tokens": np.array([3], np.int32)}
        one = EngineClient(model, Address(url))

        async def watch() -> None:
            while True:
                await one.is_ready(5)
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        try:
            batches = [batch async for batch in one.batches(inputs, ["text_output"], "one")]
        finally:
            watching.cancel()
            await one.close()
        return [response["text_output"].item().decode() for batch in batches for response in batch]

    return asyncio.run(ask())


WAYS: tuple[Callable[[str, str, str], list[str]], ...] = (blocking, asynchronous, measuring, of_the_text_model)


def all_at_once(url: str, text: str, model: str) -> dict[str, Any]:
    """What each way gave, by its name: texts, or an error."""
    found: dict[str, Any] = {}

    def ask(way: Callable[[str, str, str], list[str]]) -> None:
        try:
            found[way.__name__] = way(url, text, model)
        except (ClientError, EngineCallError) as error:
            found[way.__name__] = error

    threads = [threading.Thread(target=ask, args=(way,)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the text model's channel ping ten times as often as it does; ``watch`` asks as much more often."""
    monkeypatch.setattr(engine, "KEEPALIVE_S", 1.0)


# ---- a long wait


@pytest.mark.server
@pytest.mark.usefixtures("every_second")
def test_a_stream_that_waits_and_is_asked_about_lives(lenient: dict[str, Any]) -> None:
    found = all_at_once(lenient["urls"]["grpc"], f"wait {WAIT_S}", "echo")
    assert found == {way.__name__: TEXTS for way in WAYS}


@pytest.mark.server
@pytest.mark.usefixtures("every_second")
def test_a_server_that_allows_no_pings_ends_the_line_and_the_message_says_what_to_do(strict: dict[str, Any]) -> None:
    """The same pings; only who asks other questions in between is let live, as every answer forgives all pings."""
    found = all_at_once(strict["urls"]["grpc"], f"wait {WAIT_S}", "echo")
    assert found.pop("of_the_text_model") == TEXTS
    for error in found.values():
        assert isinstance(error, StreamBroken), error
        assert re.search(r"[Tt]oo many pings.*--keepalive 310.*minitron serve", str(error))


def help_of_triton() -> str:
    from minitron_triton.server import bundled

    wheel = bundled.find()
    done = subprocess.run(
        [wheel.server, "--help"], env={"LD_LIBRARY_PATH": str(wheel.libraries)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.server
def test_unless_told_the_client_asks_seldom_enough_for_any_server() -> None:
    default = re.search(rf"--{ALLOWED} <integer>.*?Default is (\d+)", help_of_triton(), re.DOTALL)
    assert default
    assert Endpoint().keepalive_s * 1000 > int(default[1])


@pytest.mark.server
def test_the_server_understands_what_it_is_told(lenient: dict[str, Any]) -> None:
    """As its own table says, at verbose level 1."""
    log = (Path(lenient["folder"]) / "server.log").read_text()
    told = dict(re.findall(r"\| (\w+) +\| (\d+) +\|", log))
    assert told["http2_min_recv_ping_interval_without_data_ms"] == "500"  # the user's own
    assert told["keepalive_permit_without_calls"] == "1" and told["http2_max_pings_without_data"] == "0"
    assert told["keepalive_time_ms"] == triton_flags.DEFAULTS["grpc-keepalive-time"]
    ours = float(triton_flags.DEFAULTS[ALLOWED])
    assert ours < channel.KEEPALIVE_S * 1000, "a ping of ours that is a little early must not count"


@pytest.mark.server
def test_a_connection_without_requests_may_be_kept_alive_too(lenient: dict[str, Any], strict: dict[str, Any]) -> None:
    """By others: our own clients ping only while they wait for something."""
    options = [*channel.options("", 1.0, proxies=False), ("grpc.keepalive_permit_without_calls", 1)]
    lost: list[str] = []
    with (
        grpc.insecure_channel(lenient["urls"]["grpc"], options) as kept,
        grpc.insecure_channel(strict["urls"]["grpc"], options) as ended,
    ):
        for name, one in (("kept", kept), ("ended", ended)):
            grpc.channel_ready_future(one).result(30)
            one.subscribe(lambda state, name=name: None if state is READY else lost.append(name))
        assert within(60, lambda: bool(lost))
        assert set(lost) == {"ended"}


# ---- a dead line


def generate(url: str, *words: str) -> subprocess.Popen[str]:
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    return subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", "generate", "hi", "--url", url, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": rooms},
    )  # fmt: skip


@pytest.mark.server
def test_a_server_that_stops_in_the_middle_is_noticed(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    asking = generate(one.url, "--model", "echo", "--max-tokens", "5000", "--keepalive", "1", "--deadline", "40")
    assert asking.stdout and asking.stdout.read(4) == "0 1 "
    os.kill(tritonserver(one.mark), signal.SIGSTOP)
    try:
        _, said = asking.communicate(timeout=120)
    finally:
        os.kill(tritonserver(one.mark), signal.SIGCONT)
    assert asking.returncode == StreamBroken.exit_code
    assert re.search(rf"minitron: error: {one.url}: .*dead: it did not answer a keepalive ping", said), said


@pytest.mark.usefixtures("every_second")
def test_every_way_notices_a_dead_server(start_bare: Callable[..., Bare]) -> None:
    """Stopped while all of them wait for its first word; it speaks Triton's protocol with gRPC's own server."""
    server = start_bare()

    def stop() -> None:
        while len(server.events("request")) < len(WAYS):
            time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGSTOP)

    stopping = threading.Thread(target=stop)
    stopping.start()
    found = all_at_once(server.url, prompt(silent=True), "tensorrt_llm_bls")
    stopping.join()
    assert isinstance(found.pop("of_the_text_model"), engine.EngineUnreachable)
    for error in found.values():
        assert isinstance(error, StreamBroken) and "keepalive ping" in str(error), error


@pytest.mark.server
def test_a_client_that_stops_does_not_hold_its_line(echo: Path, serve: Callable[..., Supervisor]) -> None:
    """Its machine sleeps, or is gone without a word: the server asks by itself."""
    one = serve(echo, "--", "--grpc-keepalive-time=1000", "--grpc-keepalive-timeout", "1000")
    asking = generate(one.url, "--model", "echo", "--max-tokens", "5000")
    assert asking.stdout and asking.stdout.read(2) == "0 "
    port, server = int(one.url.rpartition(":")[2]), psutil.Process(tritonserver(one.mark))

    def lines() -> int:
        return sum(each.status == "ESTABLISHED" and each.laddr.port == port for each in server.net_connections())

    assert lines() == 1
    asking.send_signal(signal.SIGSTOP)
    try:
        assert within(120, lambda: lines() == 0)
    finally:
        asking.kill()
        asking.communicate()


# ---- a long wait over HTTP


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """By what they are told: ``0.2`` says so after 0.2 s of silence, ``0`` never."""
    server = Bare(tmp_path_factory.mktemp("bare"), "--tokenizer", str(SMALL_MODEL))
    found = {seconds: Gateway("--upstream", server.url, "--sse-keep-alive", seconds) for seconds in ("0.2", "0")}
    yield found
    assert [one.end()[0] for one in found.values()] == [0, 0]
    server.end()


def streamed(gateway: Gateway, **behaviour: Any) -> tuple[int, list[str]]:
    """Status and lines of a stream whose engine needs two seconds for a token."""
    asked = {"model": "minitron", "prompt": prompt(interval_ms=2000, **behaviour), "stream": True, "max_tokens": 2}
    with contextlib.closing(gateway.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(asked))
        answer = connection.getresponse()
        return answer.status, [line for line in answer.read().decode().split("\n") if line]


def read(lines: list[str]) -> list[tuple[str, Any]]:
    return list(events(line.encode() + b"\n" for line in lines))


def test_a_silent_stream_says_that_it_lives(gateways: dict[str, Gateway]) -> None:
    """By comments, which whoever reads server-sent events passes over (HTML, section 9.2.6)."""
    (status, said), (_, unsaid) = (streamed(gateways[seconds]) for seconds in ("0.2", "0"))
    assert status == 200
    assert said[0] == ": keep-alive"  # before the first token, as where a queue holds it up
    assert ": keep-alive" in said[said.index(next(line for line in said if line.startswith("data: "))) :]
    assert not [line for line in unsaid if line.startswith(":")]
    texts = [[one["choices"][0]["text"] for _, one in read(lines)] for lines in (said, unsaid)]
    assert texts[0] == texts[1] and len(texts[0]) >= 2


def test_an_error_behind_a_sign_of_life_is_an_event(gateways: dict[str, Gateway]) -> None:
    status, lines = streamed(gateways["0.2"], error="it broke", error_after=1)
    assert status == 200 and ": keep-alive" in lines
    (error,) = [one for name, one in read(lines) if name == "error"]
    assert "it broke" in error["error"]["message"]


def test_an_error_before_any_sign_of_life_keeps_its_status(gateways: dict[str, Gateway]) -> None:
    assert gateways["0"].refusal(prompt(error="it broke"), stream=True)[0] == 500
