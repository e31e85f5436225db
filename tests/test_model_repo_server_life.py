"""The life of a server that nobody kills: ready, asked, drained, and nothing of it left. With the real tritonserver."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

import echo_repository
import hand_made
from conftest import ROOT, minitron
from minitron.errors import ClientError, NotReady
from minitron_client.client import Client
from minitron_triton.server.leftovers import Process
from supervisor import (
    FREE,
    Supervisor,
    ask,
    command_lines,
    environment,
    nothing_is_left,
    only_the_log,
    segments,
    stub,
    tritonserver,
    within,
)

pytestmark = [pytest.mark.server, pytest.mark.slow]

NEVER_ENDS = "time.sleep(600)"  # much longer than any exit timeout here

# --- ready, asked, stopped ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """A server that no test ends."""
    folder = tmp_path_factory.mktemp("shared")
    one = Supervisor(echo_repository.write(folder / "repository"), folder / "state").wait_until_ready()
    yield one
    one.send(signal.SIGTERM)
    assert one.end()[0] == 0


def test_two_servers_of_one_repository_in_the_background(echo: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    try:
        made = [minitron("serve", echo, *FREE, "--state", state, "--detach", "--json") for _ in range(2)]
        one, two = (json.loads(done.stdout) for done in made)
        assert not set(one["urls"].values()) & set(two["urls"].values())
        for document in (one, two):
            assert ask(document["urls"]["grpc"], 2) == ["0 ", "1 "]
            assert segments(document["mark"])
        listed = json.loads(minitron("status", echo, "--state", state, "--json").stdout)
        assert [(each["mark"], each["phase"]) for each in listed] == [(one["mark"], "ready"), (two["mark"], "ready")]
        assert [each["restarts"] for each in listed] == [0, 0]
        assert "ready" in minitron("status", "--state", state).stdout
        refused = minitron("stop", "--state", state, check=False)
        assert refused.returncode == 2
        assert "2 servers" in refused.stderr
    finally:
        stopped = minitron("stop", echo, "--state", state)
    assert stopped.stdout.count("drained and stopped") == 2
    assert nothing_is_left(one["mark"])
    assert nothing_is_left(two["mark"])
    assert os.listdir(state) == []


def test_all_ports_are_on_the_loopback_address(shared: Supervisor) -> None:
    pid = tritonserver(shared.mark)
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                address, port = words[1].split(":")
                listening.add((address, int(port, 16)))
    ports = {int(url.rpartition(":")[2]) for url in shared.document["urls"].values()}
    assert {port for _, port in listening} == ports
    # 127.0.0.1, and ::ffff:127.0.0.1, as proc(5) writes them on a little-endian machine.
    assert {address for address, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_models_cannot_be_loaded_or_unloaded_from_outside(shared: Supervisor) -> None:
    client = triton.InferenceServerClient(shared.url)
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model("echo")
    assert client.is_model_ready("echo")


def test_the_models_know_their_own_server(shared: Supervisor) -> None:
    known = environment(stub(shared.mark))
    assert known["MINITRON_GRPC"] == shared.url
    assert known["MINITRON_RESTARTS"] == "0"
    assert not [name for name in known if name.startswith("MINITRON_GRPC_")]  # neither TLS nor a key


# --- drained --------------------------------------------------------------------------------------------------------


def test_ctrl_c_drains_and_waits_for_nothing_else(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    """Neither for connections without a request, nor for unloading: each of the three models' ends takes 600 s."""
    config = echo_repository.CONFIG.replace("count: 1", "count: 3")
    one = serve(echo_repository.write(tmp_path / "slow", finalize=NEVER_ENDS, config=config))
    idle, kept_open = connection(one), triton.InferenceServerClient(one.url)
    assert get(idle, "/v2/health/ready") == 200
    kept_open.start_stream(lambda result, error: None)
    over_http = connection(one)
    body = json.dumps({"text_input": "hi", "max_tokens": 40, "stream": True})
    over_http.request("POST", "/v2/models/echo/generate_stream", body)
    with Client(one.url, model="echo", deadline_s=60) as client, client.stream("hi", max_tokens=40) as stream:
        texts = [next(stream).text]
        one.send(signal.SIGINT)
        assert within(60, lambda: get(idle, "/v2/health/ready") == 400)
        with pytest.raises(NotReady):
            ask(one.url, 1)
        texts += [chunk.text for chunk in stream if chunk.text]
    assert texts == [f"{number} " for number in range(40)]
    events = over_http.getresponse().read().decode()
    assert [f'"text_output":"{number} "' in events for number in range(40)] == [True] * 40
    code, said = one.end()
    assert code == 0, said  # and not 16: it was never waited for
    assert "draining" in said
    assert nothing_is_left(one.mark)
    assert list(one.state.iterdir()) == []
    kept_open.close()


def connection(one: Supervisor) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(one.document["urls"]["http"], timeout=60)


def get(kept: http.client.HTTPConnection, path: str) -> int:
    kept.request("GET", path)
    answer = kept.getresponse()
    answer.read()
    return answer.status


def test_ctrl_c_twice_does_not_wait(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    with Client(one.url, model="echo", deadline_s=60) as client, client.stream("hi", max_tokens=400) as stream:
        next(stream)
        one.send(signal.SIGINT)
        assert one.reaches("draining")
        one.send(signal.SIGINT)
        code, said = one.end()
        with pytest.raises(ClientError):
            list(stream)
    assert code == 128 + signal.SIGKILL
    assert "ended at once" in said
    assert nothing_is_left(one.mark)


def test_sixteen_streams_through_the_fronts_finish(
    small_engine: Callable[[str], Path], tmp_path: Path, serve: Callable[..., Supervisor]
) -> None:
    repository = tmp_path / "repository"
    minitron("render", small_engine("bfloat16"), "--output", repository, "--bls-max-concurrency", "8")
    one = serve(repository)
    with Client(one.url, deadline_s=120) as text, Client(one.url, model="ensemble", deadline_s=120) as ensemble:
        clients = [text, ensemble] * 8
        streams = [
            client.stream(f"Chapter {i}", max_tokens=300, min_tokens=300, temperature=0.0)
            for i, client in enumerate(clients)
        ]
        first = [next(stream) for stream in streams]
        one.send(signal.SIGTERM)
        rest = [list(stream) for stream in streams]
        code, said = one.end()
    assert code == 0, said
    assert all(len(chunks) > 5 for chunks in rest), "SIGTERM came too late to see anything"  # tokens may be gathered
    assert [chunks[-1].finish_reason for chunks in rest] == ["length"] * 16  # all 300 tokens came
    assert len(first) == 16
    assert nothing_is_left(one.mark)


def test_a_client_that_leaves_while_it_drains_still_stops_its_request(
    tmp_path: Path, serve: Callable[..., Supervisor]
) -> None:
    """The text model needs the engine's model to the end: it stops there what nobody reads. 20 ms a token here."""
    repository = hand_made.echo_repository(tmp_path)
    one = serve(repository)
    leaves = connection(one)
    body = {"text_input": "leaves", "max_tokens": 1500, "temperature": 20.0, "stream": True}
    leaves.request("POST", "/v2/models/tensorrt_llm_bls/generate_stream", json.dumps(body))
    leaves.getresponse().readline()
    with Client(one.url, deadline_s=120) as client:
        stays = client.stream("stays to its end", max_tokens=200, temperature=20.0)
        next(stays)
        one.send(signal.SIGTERM)
        assert within(60, lambda: get(connection(one), "/v2/health/ready") == 400)
        [next(stays) for _ in range(10)]  # it drains, and has for a while
        leaves.close()
        assert list(stays)[-1].finish_reason == "length"
        code, said = one.end()
    assert code == 0, said
    ended = [json.loads(line) for line in (repository / "tensorrt_llm" / "steps").read_text().splitlines()]
    assert [(each["stopped"], each["steps"] == 200) for each in ended[-2:]] == [(True, False), (False, True)]
    assert nothing_is_left(one.mark)


def test_streams_that_outlive_their_time_are_cut_off_and_that_is_said(
    echo: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(echo, "--exit-timeout", "1")
    with Client(one.url, model="echo", deadline_s=60) as client, client.stream("hi", max_tokens=1000) as stream:
        next(stream)
        stopped = minitron("stop", echo, "--state", one.state, "--json", check=False)
        with pytest.raises(ClientError):
            list(stream)
    code, said = one.end()
    assert (code, stopped.returncode) == (16, 16)
    assert "streams were left after the exit timeout of 1 s" in said
    (how,) = json.loads(stopped.stdout)
    log = only_the_log(one.state)
    assert how["log"] == str(log)
    assert how["how"] == f"did not drain within 1 s and was killed; its log: {log}"
    assert "successfully loaded 'echo'" in log.read_text()
    assert nothing_is_left(one.mark)
    again = serve(echo)  # and the log of the last one goes
    assert [path.name for path in one.state.iterdir()] == [again.mark]


def test_a_server_that_hangs_is_killed(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo, "--exit-timeout", "1")
    os.kill(tritonserver(one.mark), signal.SIGSTOP)  # it will follow nothing
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 16
    assert "was killed" in said
    assert nothing_is_left(one.mark)
    listed = minitron("status", "--state", one.state, "--json", check=False)
    assert listed.returncode == 10
    assert [each["phase"] for each in json.loads(listed.stdout)] == ["killed"]


@pytest.mark.parametrize(
    ("victim", "said"), [(tritonserver, "signal 9"), (stub, "the process of echo ended")], ids=["server", "model"]
)
def test_a_server_that_dies_while_it_drains_is_not_one_that_hangs(
    echo: Path, serve: Callable[..., Supervisor], victim: Callable[[str], int], said: str
) -> None:
    one = serve(echo)
    with Client(one.url, model="echo", deadline_s=60) as client, client.stream("hi", max_tokens=1000) as stream:
        next(stream)
        one.send(signal.SIGTERM)
        assert one.reaches("draining")
        os.kill(victim(one.mark), signal.SIGKILL)
        code, stderr = one.end()
    assert code == 7
    assert f"died while it drained ({said})" in stderr
    assert only_the_log(one.state).exists()
    assert nothing_is_left(one.mark)


# --- the container, with a stand-in for docker ----------------------------------------------------------------------


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of doubles/docker_serving.py, which is ``docker`` on PATH now."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/doubles/docker_serving.py "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("DOCKER_DOUBLE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def gpu_repository(tmp_path: Path) -> Path:
    return echo_repository.write(tmp_path / "gpu", backend="tensorrtllm", root="/models")


def calls(docker: Path) -> list[list[str]]:
    return [json.loads(line) for line in (docker / "calls").read_text().splitlines()]


def of_docker(docker: Path, one: Supervisor) -> Any:
    return Process.of(int((docker / f"minitron-{one.mark}.pid").read_text()))


def test_the_container_is_ended_when_its_models_are(
    gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(gpu_repository)
    assert one.document["container"] == f"minitron-{one.mark}"
    container = of_docker(docker, one)
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 0, said
    assert not container.lives()
    assert calls(docker)[0][:2] == ["run", "--rm"]
    assert ["kill", f"minitron-{one.mark}"] in calls(docker)
    assert list(one.state.iterdir()) == []


def test_a_container_that_knows_no_unloading_gets_sigterm(
    gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_DOUBLE_UNLOADS", "no")
    one = serve(gpu_repository)
    one.send(signal.SIGTERM)
    assert one.end()[0] == 0
    assert not (docker / f"minitron-{one.mark}.pid").exists()  # docker run saw it to its end


def test_a_container_that_crashes_comes_back(
    gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(gpu_repository, "--restarts", "1")
    first = of_docker(docker, one)
    first.send(signal.SIGKILL)
    assert within(60, lambda: one.written["restarts"] == 1 and one.written["phase"] == "ready")
    assert of_docker(docker, one) != first
    one.send(signal.SIGTERM)
    assert one.end()[0] == 0
    assert one.written["phase"] == "stopped"


def test_a_container_whose_client_and_supervisor_were_killed_is_ended_by_stop(
    gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(gpu_repository)
    container = of_docker(docker, one)
    clients = [pid for pid, words in command_lines(one.mark).items() if "docker_serving" in words]
    one.send(signal.SIGSTOP)
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    one.send(signal.SIGKILL)
    one.end()
    assert container.lives()
    minitron("stop", gpu_repository, "--state", one.state)
    assert ["kill", f"minitron-{one.mark}"] in calls(docker)
    assert within(30, lambda: not container.lives())
