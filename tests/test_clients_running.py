"""Which server ``bench``, ``generate`` and ``accept`` ask where nobody says.

State folders are made up, with this process as supervisor. Expected addresses and tokenizers are those that the
folders were made with.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bare_process import Bare
from conftest import minitron_here
from minitron_triton.server.leftovers import Process
from minitron_triton.server.state import State


def put(states: Path, repository: Path, grpc: str, phase: str = "ready", name: str | None = None) -> None:
    """A server of ``minitron serve``, as far as its state tells."""
    me = Process.of(os.getpid())
    assert me is not None
    name = name or repository.name
    urls = {"grpc": grpc, "http": "127.0.0.1:1", "metrics": "127.0.0.1:2"}
    State(states / name, name, repository, "tensorrt_llm_bls", me, phase, urls, 30).create()


def generate(states: Path, *words: str | Path) -> tuple[int, str, str]:
    return minitron_here("generate", '{"tokens": 2}', "--state", states, *words)


def test_the_one_server_that_runs_is_asked(bare: Bare, tmp_path: Path) -> None:
    put(tmp_path, Path("/somewhere/one"), bare.url)
    put(tmp_path, Path("/somewhere/ended"), "127.0.0.1:3", phase="failed")
    put(tmp_path, Path("/somewhere/starting"), "127.0.0.1:4", phase="starting")
    assert generate(tmp_path)[:2] == (0, " w0 w1\n")


def test_one_that_listens_everywhere_is_asked_here(bare: Bare, tmp_path: Path) -> None:
    put(tmp_path, Path("/somewhere/one"), bare.url.replace("127.0.0.1", "0.0.0.0"))
    assert generate(tmp_path)[:2] == (0, " w0 w1\n")


def test_several_are_named_with_how_to_choose(bare: Bare, tmp_path: Path) -> None:
    put(tmp_path, Path("/somewhere/one"), "127.0.0.1:3")
    put(tmp_path, Path("/somewhere/two"), bare.url)
    code, _, said = generate(tmp_path)
    assert code == 2 and said.count("\n") == 1
    assert f"/somewhere/one at 127.0.0.1:3; /somewhere/two at {bare.url}" in said and "--repository" in said
    assert generate(tmp_path, "--repository", Path("/somewhere/two"))[:2] == (0, " w0 w1\n")
    assert generate(tmp_path, "--url", bare.url)[:2] == (0, " w0 w1\n")
    assert generate(tmp_path, "--url", bare.url, "--repository", Path("/somewhere/two"))[0] == 2
    code, _, said = generate(tmp_path, "--repository", Path("/somewhere/three"))
    assert code == 2 and "no server of /somewhere/three" in said


@pytest.mark.parametrize("named", [False, True])
def test_the_tokenizer_is_that_of_its_repository(bare: Bare, tmp_path: Path, named: bool) -> None:
    """A folder that holds a broken one shows that it was opened, also where the server is named by its address."""
    repository = tmp_path / "repository"
    (repository / "tokenizer").mkdir(parents=True)
    (repository / "tokenizer" / "tokenizer.json").write_text("broken")
    put(tmp_path / "states", repository, bare.url)
    words = ("--url", bare.url) if named else ()
    code, _, said = minitron_here("bench", "--grid", "2:2:1", "--state", tmp_path / "states", *words)
    assert code == 3 and f"{repository}/tokenizer/tokenizer.json cannot be opened" in said


def test_accept_chooses_by_the_same_rule(tmp_path: Path) -> None:
    """Of two it asks, also where both serve one repository; one that is not ready is none."""
    repository = tmp_path / "repository"
    accept = ("accept", "--only", "server", "--state", tmp_path / "states")
    put(tmp_path / "states", repository, "127.0.0.1:3", phase="starting")
    code, _, said = minitron_here(*accept)
    assert code == 10 and "no server is ready here" in said
    put(tmp_path / "states", repository, "127.0.0.1:4", name="a")
    put(tmp_path / "states", repository, "127.0.0.1:5", name="b")
    code, _, said = minitron_here(*accept)
    assert code == 2 and "2 servers run here" in said and "its DIR or --url" in said
