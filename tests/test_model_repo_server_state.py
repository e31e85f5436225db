"""What a server's log says, and what is known and left of servers: processes, segments, state files."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import minitron
from minitron.errors import PortBusy, ServerError
from minitron_triton.server import leftovers, state
from minitron_triton.server.leftovers import Process
from minitron_triton.server.server_log import ServerLog

# --- what the server's log says (lines as tritonserver 2.51.0 wrote them) --------------------------------------------

LOG = """\
2026-01-31T09:37:44Z E 14310 server.cc:241] "CudaDriverHelper has not been initialized."
2026-01-31T09:37:44Z I 14310 model_lifecycle.cc:839] "successfully loaded 'echo'"
{more}
"""


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        (r"""2026-01-31T09:37:44Z E 14310 model_lifecycle.cc:642] "failed to load 'llm' version 1: Internal: No"""
         r""" module named 'x'\n\nAt:\n  /a/b/model.py(1): <module>\n" """.rstrip(),
         ServerError, "model llm: Internal: No module named 'x' (log"),
        ("""[libprotobuf ERROR /a/b.cc:337] Error parsing text-format inference.ModelConfig: 3:16: Message type"""
         """ "x" has no field named "y".""", ServerError, 'no field named "y"'),
        ("2026-01-31T09:29:28Z E 8449 main.cc:245] \"failed to start GRPC service: Unavailable - Socket "
         "'127.0.0.1:9001' already in use \"", PortBusy, "127.0.0.1:9001 is taken"),
        ("error: creating server: Internal - failed to load all models", ServerError, "failed to load all models"),
    ],
)  # fmt: skip
def test_why_a_server_did_not_start(tmp_path: Path, more: str, kind: type[Exception], said: str) -> None:
    path = tmp_path / "log"
    path.write_text(LOG.format(more=more))
    log = ServerLog(path)
    log.new_errors()
    error = log.explain("tritonserver ended")
    assert type(error) is kind
    assert said in str(error)
    assert log.loaded == {"echo"}
    assert "CudaDriverHelper" not in str(error)


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    line = '2026-01-31T09:37:44Z E 1 x.cc:1] "gone wrong"\n'
    path.write_text(line[:30])
    log = ServerLog(path)
    assert log.new_errors() == []
    path.write_text(line)
    assert log.new_errors() == ["gone wrong"]
    assert log.new_errors() == []


# --- processes and state --------------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"], env={"MINITRON_SERVER": "marked-for-the-test"})
    yield child
    child.kill()
    child.wait()


def test_a_zombie_does_not_live(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert process.lives()
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and not yet waited for
    assert Path(f"/proc/{sleeper.pid}").exists()
    assert not process.lives()


def test_a_later_process_of_the_same_number_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert not Process(process.pid, process.started - 1).lives()


def test_exactly_the_marked_processes_and_segments_go(sleeper: subprocess.Popen[bytes]) -> None:
    other = Path("/dev/shm/minitron-another-mark-0-x")
    mine = Path("/dev/shm/minitron-marked-for-the-test-1-x")
    for segment in (mine, other):
        segment.touch()
    try:
        assert leftovers.remove("marked-for") == 0  # a part of the mark is not the mark
        assert sleeper.poll() is None
        assert leftovers.remove("marked-for-the-test") == 1
        assert sleeper.wait(5) == -9
        assert not mine.exists()
        assert other.exists()
    finally:
        other.unlink()
        mine.unlink(missing_ok=True)


def test_state_lies_where_xdg_says_and_broken_files_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state.home() == tmp_path / "state" / "minitron-trtllm" / "servers"
    for name, content in {"a": "{", "b": "[]", "c": '{"schema": 99}'}.items():
        (state.home() / name).mkdir(parents=True)
        (state.home() / name / "state.json").write_text(content)
    assert state.servers(state.home()) == []


def test_nothing_to_see_and_nothing_to_stop(tmp_path: Path) -> None:
    done = minitron("status", "--state", tmp_path, "--json", check=False)
    assert (done.returncode, json.loads(done.stdout)) == (10, [])
    done = minitron("stop", "--state", tmp_path, "--json")
    assert json.loads(done.stdout) == []


def written(folder: Path, owner: Process) -> state.State:
    one = state.State(folder, folder.name, Path("/r"), "echo", owner, "ready", {"http": "h:1"}, 30)
    one.create()
    return one


def test_a_state_is_its_owners_and_whole_from_the_first_moment(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    owner = Process.of(sleeper.pid)
    assert owner is not None
    made = written(tmp_path / "s" / "mark", owner)
    assert made.folder.stat().st_mode & 0o077 == 0
    assert os.listdir(tmp_path / "s") == ["mark"]
    assert state.servers(tmp_path / "s") == [made]
    assert state.servers(tmp_path / "s", Path("/other")) == []


def test_the_state_of_a_killed_supervisor_stays_with_its_log_and_nothing_else(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    owner = Process.of(sleeper.pid)
    assert owner is not None
    made = written(tmp_path / "mark", owner)
    made.log.write_text("what happened")
    (made.folder / "api-key").write_text("secret")
    (made.folder / "backends").mkdir()
    (made.folder / "lib").symlink_to("/nowhere")
    assert [one.phase for one in state.servers(tmp_path)] == ["ready"]
    sleeper.kill()
    sleeper.wait()
    assert [one.phase for one in state.servers(tmp_path)] == ["dead"]
    assert sorted(os.listdir(made.folder)) == ["server.log", "state.json"]


def test_folders_half_made_or_half_removed_by_a_killed_one_go(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    owner = Process.of(sleeper.pid)
    assert owner is not None
    living, dead = f".mark.{owner.pid}.{owner.started}", f".mark.{owner.pid}.{owner.started - 1}"
    for name in (living, dead):
        (tmp_path / name / "backends").mkdir(parents=True)
    assert state.servers(tmp_path) == []
    assert os.listdir(tmp_path) == [living]
