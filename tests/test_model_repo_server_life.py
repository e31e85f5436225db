"""The life of a server: ready, asked, drained, killed, and nothing of it left. All with the real tritonserver.

Processes and segments are counted here by other means than the toolkit's: a process is the server's when its command
line names the server's state folder or its mark, a segment when its name holds the mark.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import echo_repository
from conftest import ROOMS, ROOT, minitron
from minitron_trtllm.client import ApiKey, Client, Tls
from minitron_trtllm.errors import ClientError, InvalidRequest, NotReady
from minitron_trtllm.server.leftovers import Process

pytestmark = pytest.mark.server

FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
KEY = "a-key-that-must-not-be-seen"


class Supervisor:
    """``minitron serve`` in a process of its own, on free ports."""

    def __init__(self, repository: Path, state: Path, *flags: str | Path, path: str | None = None) -> None:
        words = ["serve", repository, *FREE, "--state", state, "--json", *flags]
        rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        more = {"PYTHONPATH": rooms} | ({"PATH": path} if path else {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minitron_trtllm.cli", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | more,
        )  # fmt: skip
        self.repository, self.state = repository, state
        self.document: dict[str, Any] = {}

    def wait_until_ready(self) -> Supervisor:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("}"):
                self.document = json.loads("".join(lines))
                return self
        raise AssertionError(f"not ready: {self.end()}")

    @property
    def mark(self) -> str:
        return str(self.document["mark"])

    @property
    def url(self) -> str:
        return str(self.document["urls"]["grpc"])

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        """Wait for its end: exit code and stderr."""
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """Start supervisors with ``tmp_path``/state; whatever a test leaves is stopped."""
    started: list[Supervisor] = []

    def start(repository: Path, *flags: str | Path, ready: bool = True, path: str | None = None) -> Supervisor:
        one = Supervisor(repository, tmp_path / "state", *flags, path=path)
        started.append(one)
        return one.wait_until_ready() if ready else one

    yield start
    for one in started:  # not gently: that takes seconds each, and is what some of the tests are about
        one.process.kill()
        one.process.communicate()
    minitron("stop", "--all", "--state", tmp_path / "state", check=False)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    return echo_repository.write(tmp_path / "echo-repository")


def command_lines(text: str) -> dict[int, str]:
    """Living processes whose command line holds ``text``, this one and its parents' shells apart."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if text in words:
                    found[int(entry.name)] = words
        except OSError:
            continue
    return found


def tritonserver(mark: str) -> int:
    (pid,) = [pid for pid, words in command_lines(mark).items() if "/bin/tritonserver " in words]
    return pid


def segments(mark: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if mark in name]


def nothing_is_left(mark: str) -> bool:
    return not command_lines(mark) and not segments(mark)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ask(url: str, tokens: int, **options: Any) -> list[str]:
    """The texts that ``echo`` streams."""
    with (
        Client(url, model="echo", deadline_s=30, **options) as client,
        client.stream("hi", max_tokens=tokens) as stream,
    ):
        return [chunk.text for chunk in stream if chunk.text]


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
    small_repository: Callable[[str], Path], serve: Callable[..., Supervisor]
) -> None:
    one = serve(small_repository("bfloat16"))
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


# --- TLS and API key -----------------------------------------------------------------------------------------------


def test_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    assert ask(one.url, 2, tls=Tls(certificates / "ca.crt")) == ["0 ", "1 "]
    for wrong in (None, Tls()):  # plain; an authority that did not sign it
        with pytest.raises(NotReady):
            ask(one.url, 1, tls=wrong)
    status, answer = http(one.document["urls"]["http"], "/v2/models/echo")
    assert (status, "restricted" in answer) == (403, True)
    assert http(one.document["urls"]["http"], "/v2/health/ready")[0] == 200


def test_mutual_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key",
                "--tls-ca", certificates / "ca.crt")  # fmt: skip
    ours = Tls(certificates / "ca.crt", certificates / "client.crt", certificates / "client.key")
    assert ask(one.url, 2, tls=ours) == ["0 ", "1 "]
    with pytest.raises(NotReady):
        ask(one.url, 1, tls=Tls(certificates / "ca.crt"))


def test_api_key(echo: Path, serve: Callable[..., Supervisor], tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    one = serve(echo, "--api-key-file", file, "--verbose")
    address = one.document["urls"]["http"]
    assert ask(one.url, 2, api_key=ApiKey(KEY)) == ["0 ", "1 "]
    for wrong in (None, ApiKey("another-key-of-length")):
        with pytest.raises(InvalidRequest, match="restricted"):
            ask(one.url, 1, api_key=wrong)
    assert http(address, "/v2/models/echo", {"api-key": KEY})[0] == 200
    assert http(address, "/v2/models/echo", {"api-key": "wrong"})[0] == 403
    assert http(address, "/v2/models/echo")[0] == 403
    assert http(address, "/v2/health/ready")[0] == 200
    for path in one.state.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 0
    assert KEY not in said
    assert "command line" in said  # the warning


def http(address: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    from http.client import HTTPConnection

    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


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
