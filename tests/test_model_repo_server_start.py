"""How a server starts, or does not and says why: broken models, signals, folders of every name. With tritonserver."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import echo_repository
import hand_made
from conftest import minitron
from minitron_client.client import Client
from minitron_triton.server import state
from supervisor import FREE, Supervisor, command_lines, nothing_is_left, only_the_log, within

pytestmark = pytest.mark.server

# --- models that cannot become ready --------------------------------------------------------------------------------

SLOW = "time.sleep(600)"


def _without_code(folder: Path) -> Path:
    repository = echo_repository.write(folder)
    (repository / "echo" / "1" / "model.py").unlink()
    return repository


def _beside_a_slow_one(folder: Path) -> Path:
    repository = echo_repository.write(folder, initialize="raise ValueError('no such engine')", models=["slow", "echo"])
    echo_repository.add_model(repository, "slow", SLOW)
    return repository


def _initialize(code: str) -> Callable[[Path], Path]:
    return lambda folder: echo_repository.write(folder, initialize=code)


#: A repository for each way not to become ready, what the message says of it, and more flags. All but the last are
#: ended by what happened, not by --ready-timeout (600 s). Of a process that was killed Triton says that it is not
#: healthy, unless the supervisor is quicker; both add that it ended.
BROKEN: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    "raises": (
        _initialize("raise ValueError('no such engine')"), "model echo: Internal: ValueError: no such engine", ()),
    "imports what is missing": (_initialize("import no_such_module"), "No module named 'no_such_module'", ()),
    "ends": (_initialize("print('last words', flush=True); import os; os._exit(3)"), "last words", ()),
    "is killed": (_initialize("import os; os.kill(os.getpid(), 9)"), " ended", ()),
    "fails while another loads": (_beside_a_slow_one, "model echo: Internal: ValueError: no such engine", ()),
    "has no code": (_without_code, "Python model file not found", ()),  # tritonserver itself waits for ever
    "has a broken config": (
        lambda folder: echo_repository.write(folder, config=echo_repository.CONFIG + "no_such_field: 1\n"),
        'no field named "no_such_field"', ()),
    "takes for ever": (_initialize(SLOW), "not ready within 1 s; --ready-timeout", ("--ready-timeout", "1")),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Supervisor]]:
    """A server for each, started at the same time, with state of its own."""
    started = {}
    for number, (how, (make, _, flags)) in enumerate(BROKEN.items()):
        folder = tmp_path_factory.mktemp(f"broken{number}")
        started[how] = Supervisor(make(folder / "repository"), folder / "state", *flags)
    yield started
    for one in started.values():
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("how", BROKEN)
def test_a_model_that_cannot_become_ready_ends_the_wait(broken: dict[str, Supervisor], how: str) -> None:
    one = broken[how]
    code, said = one.end(timeout_s=120)
    assert code == 7
    assert BROKEN[how][1] in said
    assert "\\n" not in said
    (known,) = state.servers(one.state)
    assert known.phase == "failed"
    assert nothing_is_left(known.mark)
    assert only_the_log(one.state).exists()


def test_a_process_that_dies_before_it_can_be_missed(
    echo: Path, serve: Callable[..., Supervisor], tmp_path: Path
) -> None:
    """Where the path of the backend holds what the shell takes, the models' processes end at once, and tritonserver
    does not notice; ``bundled`` keeps such paths from it, so here PATH has a bash that ends."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bash").write_text("#!/bin/sh\necho what the shell said\nexit 3\n")
    (programs / "bash").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    one = serve(echo, ready=False, PATH=path)
    code, said = one.end(timeout_s=120)
    assert code == 7
    assert "the process of a model ended while it was loaded: what the shell said" in said


@pytest.mark.slow
def test_an_engine_may_take_its_time_to_load(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    """The text model is there before it, and asks every five seconds whether the server answers: not yet."""
    repository = hand_made.echo_repository(tmp_path)
    model = repository / "tensorrt_llm" / "1" / "model.py"
    begins = "    def initialize(self, args: dict[str, str]) -> None:\n"
    assert begins in model.read_text()
    model.write_text(model.read_text().replace(begins, begins + "        time.sleep(9)\n"))
    one = serve(repository)
    with Client(one.url, deadline_s=60) as client:
        assert list(client.stream("a b", max_tokens=4))[-1].finish_reason == "length"
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 0, said


def test_a_detached_start_that_fails_says_why(tmp_path: Path) -> None:
    echo = _without_code(tmp_path / "repository")
    done = minitron("serve", echo, *FREE, "--state", tmp_path / "state", "--detach", check=False, timeout=120)
    assert done.returncode == 7
    assert "Python model file not found" in done.stderr


# --- signals while it starts ----------------------------------------------------------------------------------------


def test_ctrl_c_while_loading(tmp_path: Path, serve: Callable[..., Supervisor]) -> None:
    one = serve(echo_repository.write(tmp_path / "slow", initialize=SLOW), ready=False)
    folder = str(tmp_path / "state")
    assert within(60, lambda: any("stub" in words for words in command_lines(folder).values()))
    one.send(signal.SIGINT)
    code, _ = one.end()
    assert code == 130
    assert not [words for words in command_lines(folder).values() if "triton" in words.split()[0]]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("flags", [(), ("--detach",)])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_first_trace_leaves_none(
    echo: Path, tmp_path: Path, flags: tuple[str, ...], sign: signal.Signals
) -> None:
    """Between making its folder and hearing signals a server must not be caught: several tries, for it is short."""
    started = [Supervisor(echo, tmp_path / str(attempt), *flags) for attempt in range(3)]
    without_trace = list(started)
    while without_trace:
        for one in tuple(without_trace):
            assert one.process.poll() is None
            if one.state.exists() and any(one.state.iterdir()):
                one.send(sign)
                without_trace.remove(one)
    for one in started:
        assert one.end()[0] == 130
        assert list(one.state.iterdir()) == []


# --- folders of every name ------------------------------------------------------------------------------------------

#: What a shell, a list of paths, Triton's config or Python without a locale could take for something else.
ODD = 'it\'s "a" b; $HOME & c\\d,e üß*?[x] %s #${y} {{z}}'


def test_a_folder_may_have_any_name(
    small_engine: Callable[[str], Path], tmp_path: Path, serve: Callable[..., Supervisor]
) -> None:
    """The repository's, the state's and the virtual environment's; longer than any name that Triton itself makes."""
    odd = tmp_path / ODD / ("long" * 40) / ("longer" * 40) / ("longest" * 30)
    odd.mkdir(parents=True)
    repository, link = odd / "repository", tmp_path / "link"
    link.symlink_to(repository)
    minitron("render", small_engine("bfloat16"), "--output", repository, "--bls-max-concurrency", "2")
    assert "nothing is wrong" in minitron("check", repository).stdout
    (odd / "venv").symlink_to(sys.prefix)
    one = Supervisor(link, odd / "a:b", python=odd / "venv" / "bin" / "python", LC_ALL="C")
    try:
        one.wait_until_ready()
        with Client(one.url, deadline_s=60) as client:
            assert client.generate("In the beginning", max_tokens=8, temperature=0.0).text
        stopped = json.loads(minitron("stop", repository, "--state", odd / "a:b", "--json").stdout)
        assert [each["how"] for each in stopped] == ["drained and stopped"]
        assert one.end()[0] == 0
        assert nothing_is_left(one.mark)
    finally:
        one.process.kill()
        one.process.communicate()
