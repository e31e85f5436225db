"""Servers that are killed or crash: they come back, and nothing of them is left. With the real tritonserver."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import echo_repository
import hand_made
import kill_drill
from conftest import minitron
from minitron_client.client import Client
from minitron_triton.server import leftovers
from minitron_triton.server.launch import MARK_VARIABLE, Launch, Options, Served
from minitron_triton.server.restarts import Restarts
from minitron_triton.server.running import Crashed, Running
from supervisor import (
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


def test_a_crashed_server_comes_back_until_it_crashes_too_often(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo, "--restarts", "1")
    os.kill(tritonserver(one.mark), signal.SIGSEGV)
    assert one.reaches("restarting")
    one.send(signal.SIGSTOP)  # so that it stays in that phase while we look
    shown = minitron("status", "--state", one.state, check=False)
    assert shown.returncode == 10
    assert "restarting" in shown.stdout
    for url in one.document["urls"].values():  # its ports stay its own meanwhile
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(url.rpartition(":")[2])))
    one.send(signal.SIGCONT)
    assert one.reaches("ready")
    (listed,) = json.loads(minitron("status", "--state", one.state, "--json").stdout)
    assert (listed["phase"], listed["restarts"], listed["urls"]) == ("ready", 1, one.document["urls"])
    assert ask(one.url, 2) == ["0 ", "1 "]
    assert environment(stub(one.mark))["MINITRON_RESTARTS"] == "1"
    os.kill(stub(one.mark), signal.SIGKILL)  # which Triton does not mind: it would answer with errors from now on
    code, said = one.end()
    assert code == 7
    assert "tritonserver ended by itself with signal 11" in said
    assert "the process of echo_0_0 ended by itself" in said
    assert "crashed 2 times" in said
    assert one.written["phase"] == "failed"
    log = only_the_log(one.state).read_text()
    assert log.count("successfully loaded 'echo'") == 2
    assert "Signal (11) received" in log  # with what Triton says of it, a backtrace
    assert nothing_is_left(one.mark)
    assert f"its log: {log}" not in minitron("stop", echo, "--state", one.state).stdout
    assert only_the_log(one.state).read_text() == log


def test_a_server_that_crashes_while_it_loads_is_started_again(echo: Path, serve: Callable[..., Supervisor]) -> None:
    """As Triton 2.51 was seen to do on a busy machine: it aborted over the lock of a model's process that it had killed
    for being late."""
    one = serve(echo, "--restarts", "1", ready=False)
    assert within(60, lambda: bool(processes(one.state, "/bin/tritonserver ")))
    os.kill(processes(one.state, "/bin/tritonserver ")[0], signal.SIGABRT)
    one.wait_until_ready()
    assert one.written["restarts"] == 1
    assert ask(one.url, 2) == ["0 ", "1 "]


def test_a_server_that_waits_for_the_end_of_a_process_while_it_loads_is_given_up(tmp_path: Path) -> None:
    """Triton's Python backend was seen to do so for ever (stub_launcher.cc, WaitForStubProcess).

    Its place is taken by a program of its name that waits for a process, which is all that can be seen from outside.
    """
    (tmp_path / "tritonserver").symlink_to(os.path.realpath(sys.executable))
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    mark = "a-server-of-a-test"
    launch = Launch(mark, (str(tmp_path / "tritonserver"), "-c", code), {MARK_VARIABLE: mark}, None, ())
    running = Running(launch, tmp_path / "log", 0)
    served = Served(tmp_path, "python", ("echo",), "echo", tmp_path, 1, None, 0)
    try:
        with pytest.raises(Crashed, match="waits for the end of it"):
            running.wait_until_ready(served, Options(), 1, lambda: None)
    finally:
        leftovers.remove(mark)
        running.child.wait()


def test_a_server_that_crashes_at_every_start_stays_down(echo: Path, serve: Callable[..., Supervisor]) -> None:
    (echo / "echo" / "1" / "model.py").write_text("import os\nos.kill(os.getppid(), 6)\n")
    one = serve(echo, "--restarts", "1", ready=False)
    code, said = one.end()
    assert code == 7
    assert said.count("tritonserver ended with signal 6 before it was ready") == 3  # twice on the way, once at the end
    assert "crashed 2 times" in said


def processes(state: Path, name: str) -> list[int]:
    """Those of servers that were started with this folder for their state, by what is in their command line."""
    return [pid for pid, words in command_lines(str(state)).items() if name in words]


def test_a_server_that_hangs_in_its_crash_comes_back(echo: Path, serve: Callable[..., Supervisor]) -> None:
    """Triton's own handler of signals was seen to deadlock behind its first line, with the process alive and ready."""
    one = serve(echo)
    with (one.state / one.mark / "server.log").open("a") as log:
        log.write("Signal (11) received.\n")
    assert within(60, lambda: one.written["restarts"] == 1)
    assert one.reaches("ready")
    assert ask(one.url, 2) == ["0 ", "1 "]
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert (code, "tritonserver hangs since signal 11" in said) == (0, True)


def test_a_server_whose_grpc_streams_hang_comes_back(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    """The text model notices, with less patience here than it has. A stopped server stands for a deadlocked one."""
    repository = hand_made.echo_repository(tmp_path)
    model = repository / "tensorrt_llm_bls" / "1" / "model.py"
    code = model.read_text()
    model.write_text(code.replace("= 5.0, 15.0, 2", "= 0.2, 1.0, 2"))
    assert model.read_text() != code
    one = serve(repository)
    os.kill(tritonserver(one.mark), signal.SIGSTOP)
    assert within(60, lambda: one.written["restarts"] == 1)
    assert one.reaches("ready")
    with Client(one.url) as client:
        assert client.generate("the fox", max_tokens=2).token_count == 2
    one.send(signal.SIGTERM)
    _, said = one.end()
    assert "the process of tensorrt_llm_bls_0_0 ended by itself" in said
    assert "the server answers no gRPC stream any more" in only_the_log(one.state).read_text()


def test_without_restarts_a_crash_is_the_end(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo, "--restarts", "0")
    os.kill(tritonserver(one.mark), signal.SIGKILL)
    code, said = one.end()
    assert code == 128 + signal.SIGKILL
    assert "ended by itself with signal 9" in said
    assert nothing_is_left(one.mark)
    assert "successfully loaded" in only_the_log(one.state).read_text()


def test_pauses_between_restarts() -> None:
    """The documented 1, 2, 4 s, three within 600 s, by a clock of our own."""
    now = 0.0
    restarts = Restarts(3, clock=lambda: now)
    assert [restarts.next_pause_s() for _ in range(4)] == [1, 2, 4, None]
    now = 599.0
    assert restarts.next_pause_s() is None
    now = 601.0
    assert restarts.next_pause_s() == 1
    assert restarts.count == 4
    assert Restarts(0).next_pause_s() is None


def test_the_supervisor_is_killed_and_the_server_ends_by_itself(echo: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo)
    with_server = tritonserver(one.mark)
    one.send(signal.SIGKILL)
    one.end()
    pidfd = os.pidfd_open(with_server)  # which the kernel sent SIGTERM (prctl(2)): it ends without anybody's help
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    listed = minitron("status", "--state", one.state, "--json", check=False)
    assert (listed.returncode, [each["phase"] for each in json.loads(listed.stdout)]) == (10, ["dead"])
    assert nothing_is_left(one.mark)
    assert only_the_log(one.state).exists()


@pytest.mark.parametrize("command", ["status", "stop", "serve"])
def test_what_two_killed_ones_left_is_removed_by_the_next_command(
    echo: Path, tmp_path: Path, serve: Callable[..., Supervisor], command: str
) -> None:
    one = serve(echo)
    server = tritonserver(one.mark)
    one.send(signal.SIGSTOP)  # or it would clean up
    os.kill(server, signal.SIGKILL)
    one.send(signal.SIGKILL)
    one.end()
    orphans = [words for words in command_lines(one.mark).values() if "triton_python_backend_stub" in words]
    assert orphans, "there was nothing to clean up, so this proves nothing"
    assert segments(one.mark)
    if command == "serve":  # also of another repository
        two = serve(echo_repository.write(tmp_path / "another"))
        assert ask(two.url, 1) == ["0 "]
    else:
        said = minitron(command, echo, "--state", one.state, check=False).stdout
        assert "dead" in said
        assert only_the_log(one.state).exists()
    assert nothing_is_left(one.mark)


def test_kills_at_random_moments_each_followed_by_serve(echo: Path, tmp_path: Path) -> None:
    """A piece of ``make drill-kill``."""
    drill = kill_drill.Drill(echo, tmp_path / "state", seed=6)
    for moment in kill_drill.MOMENTS:
        drill.kill(moment)
    drill.end()
