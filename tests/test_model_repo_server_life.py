"""The life of a server: ready, asked, drained, killed, and nothing of it left. All with the real tritonserver."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import echo_repository
from conftest import ROOT, minitron
from minitron_trtllm.client import Client
from minitron_trtllm.errors import ClientError
from minitron_trtllm.server.leftovers import Process
from supervisor import FREE, Supervisor, ask, command_lines, nothing_is_left, segments, tritonserver, within

pytestmark = pytest.mark.server

# --- ready, asked, stopped ------------------------------------------------------------------------------------------


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


def test_all_ports_are_on_the_loopback_address(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    pid = tritonserver(one.mark)
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                address, port = words[1].split(":")
                listening.add((address, int(port, 16)))
    assert {port for _, port in listening} == {int(url.rpartition(":")[2]) for url in one.document["urls"].values()}
    # 127.0.0.1, and ::ffff:127.0.0.1, as proc(5) writes them on a little-endian machine.
    assert {address for address, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_models_cannot_be_loaded_or_unloaded_from_outside(echo: Path, serve: Callable[..., Supervisor]) -> None:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    one = serve(echo)
    client = triton.InferenceServerClient(one.url)
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model("echo")
    assert client.is_model_ready("echo")


def test_ctrl_c_drains(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    with Client(one.url, model="echo", deadline_s=30) as client, client.stream("hi", max_tokens=40) as stream:
        texts = [next(stream).text]
        one.send(signal.SIGINT)
        texts += [chunk.text for chunk in stream if chunk.text]
    assert texts == [f"{number} " for number in range(40)]
    code, said = one.end()
    assert code == 0, said
    assert "draining" in said
    assert nothing_is_left(one.mark)


def test_ctrl_c_twice_does_not_wait(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    with Client(one.url, model="echo", deadline_s=60) as client, client.stream("hi", max_tokens=400) as stream:
        next(stream)
        one.send(signal.SIGINT)
        assert within(30, lambda: "draining" in minitron("status", "--state", one.state, check=False).stdout)
        one.send(signal.SIGINT)
        code, said = one.end()
        with pytest.raises(ClientError):
            list(stream)
    assert code == 128 + signal.SIGKILL
    assert "ended at once" in said
    assert nothing_is_left(one.mark)


def test_sixteen_streams_through_the_front_finish(
    small_engine: Callable[[str], Path], tmp_path: Path, serve: Callable[..., Supervisor]
) -> None:
    repository = tmp_path / "repository"
    minitron("repo", "render", small_engine("bfloat16"), "--output", repository)
    one = serve(repository)
    with Client(one.url, deadline_s=120) as client:
        streams = [client.stream(f"Chapter {i}", max_tokens=300, min_tokens=300, temperature=0.0) for i in range(16)]
        first = [next(stream) for stream in streams]
        one.send(signal.SIGTERM)
        rest = [list(stream) for stream in streams]
        code, said = one.end()
    assert code == 0, said
    assert all(len(chunks) > 100 for chunks in rest), "SIGTERM came too late to see anything"
    assert [chunks[-1].finish_reason for chunks in rest] == ["length"] * 16  # all 300 tokens came
    assert len(first) == 16
    assert nothing_is_left(one.mark)


# --- killed ---------------------------------------------------------------------------------------------------------


def test_the_server_is_killed(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    os.kill(tritonserver(one.mark), signal.SIGKILL)
    code, said = one.end()
    assert code == 128 + signal.SIGKILL
    assert "ended by itself" in said
    assert nothing_is_left(one.mark)
    (listed,) = json.loads(minitron("status", "--state", one.state, "--json", check=False).stdout)
    assert listed["phase"] == "failed"
    assert "successfully loaded" in Path(listed["log"]).read_text()
    minitron("stop", echo, "--state", one.state)
    assert os.listdir(one.state) == []


def test_the_supervisor_is_killed_and_the_server_ends_by_itself(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    one.send(signal.SIGKILL)
    one.end()
    assert within(60, lambda: not command_lines(one.mark))
    minitron("stop", echo, "--state", one.state)
    assert nothing_is_left(one.mark)
    assert os.listdir(one.state) == []


def test_both_are_killed_and_stop_removes_what_is_left(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    server = tritonserver(one.mark)
    one.send(signal.SIGSTOP)  # or it would clean up
    os.kill(server, signal.SIGKILL)
    one.send(signal.SIGKILL)
    one.end()
    orphans = [words for words in command_lines(one.mark).values() if "triton_python_backend_stub" in words]
    assert orphans, "there was nothing to clean up, so this proves nothing"
    assert segments(one.mark)
    stopped = minitron("stop", echo, "--state", one.state)
    assert "was dead already" in stopped.stdout
    assert nothing_is_left(one.mark)


def test_what_a_dead_server_left_goes_when_its_repository_is_served_again(
    echo: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(echo)
    server = tritonserver(one.mark)
    one.send(signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    one.end()
    two = serve(echo)
    assert nothing_is_left(one.mark)
    assert ask(two.url, 1) == ["0 "]


def test_a_server_that_outlives_its_time_is_killed_and_that_is_said(
    echo: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(echo, "--exit-timeout", "1")
    os.kill(tritonserver(one.mark), signal.SIGSTOP)  # it will not follow SIGTERM
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 7
    assert "outlived its exit timeout of 1 s" in said
    assert nothing_is_left(one.mark)


# --- not started ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"initialize": "raise ValueError('no such engine')"}, "model echo: Internal: ValueError: no such engine"),
        ({"config": echo_repository.CONFIG + "no_such_field: 1\n"}, 'no field named "no_such_field"'),
    ],
)
def test_a_model_that_does_not_load(
    tmp_path: Path, serve: Callable[..., Supervisor], fault: dict[str, str], said: str
) -> None:
    one = serve(echo_repository.write(tmp_path / "broken", **fault), ready=False)
    code, stderr = one.end()
    assert code == 7
    assert said in stderr
    assert "\\n" not in stderr
    assert not [name for name in os.listdir("/dev/shm") if str(tmp_path) in name]
    (listed,) = json.loads(minitron("status", "--state", one.state, "--json", check=False).stdout)
    assert nothing_is_left(listed["mark"])


def test_a_model_without_its_code_is_noticed_at_once(echo: Path, serve: Callable[..., Supervisor]) -> None:
    (echo / "echo" / "1" / "model.py").unlink()
    code, stderr = serve(echo, ready=False).end(timeout_s=60)  # tritonserver itself waits for ever
    assert code == 7
    assert "Python model file not found" in stderr


def test_the_time_to_get_ready_has_an_end(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    slow = echo_repository.write(tmp_path / "slow", initialize="time.sleep(60)")
    code, stderr = serve(slow, "--ready-timeout", "1", ready=False).end()
    assert code == 7
    assert "not ready within 1 s" in stderr


def test_ctrl_c_while_loading(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    slow = echo_repository.write(tmp_path / "slow", initialize="time.sleep(60)")
    one = serve(slow, ready=False)
    state = str(tmp_path / "state")
    assert within(60, lambda: any("stub" in words for words in command_lines(state).values()))
    one.send(signal.SIGINT)
    code, _ = one.end(timeout_s=60)
    assert code == 130
    assert not [words for words in command_lines(state).values() if "triton" in words.split()[0]]
    assert os.listdir(state) == []


@pytest.mark.parametrize("flags", [(), ("--detach",)])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_first_trace_leaves_none(
    echo: Path, tmp_path: Path, flags: tuple[str, ...], sign: signal.Signals
) -> None:
    """Between making its folder and hearing signals a server must not be caught: several tries, for it is short."""
    for attempt in range(3):
        state = tmp_path / str(attempt)
        started = Supervisor(echo, state, *flags)
        while not (state.exists() and any(state.iterdir())):
            assert started.process.poll() is None
        started.process.send_signal(sign)
        started.process.communicate(timeout=60)
        assert started.process.returncode == 130
        assert list(state.iterdir()) == []


def test_a_detached_start_that_fails_says_why(echo: Path, tmp_path: Path) -> None:
    (echo / "echo" / "1" / "model.py").unlink()
    done = minitron("serve", echo, *FREE, "--state", tmp_path / "state", "--detach", check=False, timeout=60)
    assert done.returncode == 7
    assert "Python model file not found" in done.stderr


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


def test_the_container_is_drained(gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(gpu_repository)
    assert one.document["container"] == f"minitron-{one.mark}"
    assert (docker / f"{one.document['container']}.pid").exists()
    one.send(signal.SIGTERM)
    assert one.end()[0] == 0
    assert not (docker / f"{one.document['container']}.pid").exists()
    assert calls(docker)[0][:2] == ["run", "--rm"]


def test_a_container_whose_client_and_supervisor_were_killed_is_ended_by_stop(
    gpu_repository: Path, docker: Path, serve: Callable[..., Supervisor]
) -> None:
    one = serve(gpu_repository)
    container = int((docker / f"minitron-{one.mark}.pid").read_text())
    clients = [pid for pid, words in command_lines(one.mark).items() if "docker_serving" in words]
    one.send(signal.SIGSTOP)
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    one.send(signal.SIGKILL)
    one.end()
    assert Path(f"/proc/{container}").exists()
    minitron("stop", gpu_repository, "--state", one.state)
    assert ["kill", f"minitron-{one.mark}"] in calls(docker)
    assert within(30, lambda: Process.of(container) is None)
