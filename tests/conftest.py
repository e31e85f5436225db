"""Fixtures that many tests share: the small Minitron on its way through the stages, each stage made once a session."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from bare_process import Bare

ROOT = Path(__file__).parent.parent
SMALL_MODEL = ROOT / "models" / "small-minitron"
DATA = Path(__file__).parent / "data"


# No test is judged by the clock: a busy machine takes seconds for what takes milliseconds here.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure() -> None:
    """Tests press Ctrl-C in programs they start; a shell that put us in the background made those deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests, and the clients of others that they start, ask servers on this machine, whatever proxy it needs for others.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
        filter(None, ("127.0.0.1,localhost", os.environ.get("no_proxy") or os.environ.get("NO_PROXY")))
    )


#: Files whose tests take longest: workers that begin with these end together.
_LONGEST = (
    "test_accept", "test_demo", "test_gateway_many", "test_gateway_chat", "test_house_base_wheel",
    "test_model_repo_check", "test_clients_server", "test_clients_load_runs", "test_model_repo_server_life",
    "test_model_repo_server_kills", "test_house_readme", "test_model_repo_bls", "test_gateway_serve",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the rest as they were."""
    place = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def outside_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the make that runs the tests, its variables and options: the next one is a user's first."""
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS"):
        monkeypatch.delenv(name, raising=False)


def minitron(*words: str | Path, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "minitron_cli", *map(str, words)],
        capture_output=True, text=True, timeout=timeout, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)},
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"minitron {' '.join(map(str, words))} exited with {done.returncode}:\n{done.stderr}")
    return done


def minitron_here(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``minitron`` run in this process: much faster."""
    from minitron_cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main.main([str(word) for word in words])
        except SystemExit as end:
            code = int(str(end.code))
    return code, out.getvalue(), err.getvalue()


ROOMS = ("core", "build", "model_repo", "clients", "cli")


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """trtllm-build and docker on PATH, played by the programs in doubles/, and a cache folder of our own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("trtllm-build", "trtllm_build.py"), ("docker", "docker.py")):
        wrapper = programs / name
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/doubles/{script} "$@"\n')
        wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The small Minitron's Hugging Face folder."""
    return SMALL_MODEL


@pytest.fixture(scope="session")
def answered_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``answered_model(name)``: the folder of a model that ``answers.py`` is about, made once."""
    from answers import make_model

    return functools.cache(lambda name: make_model(name, lambda: tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``small_checkpoint(precision)``: its checkpoint, converted once per precision."""
    return _once_per_precision(tmp_path_factory, "checkpoint", lambda precision, out: minitron(
        "convert", SMALL_MODEL, "--output", out, "--precision", precision))  # fmt: skip


@pytest.fixture(scope="session")
def small_engine(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Callable[[str], Path]
) -> Callable[[str], Path]:
    """``small_engine(precision)``: its CPU engine in exact mode."""
    return _once_per_precision(tmp_path_factory, "engine", lambda precision, out: minitron(
        "build", small_checkpoint(precision), "--target", "cpu", "--output", out))  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """The CPU engine of the model "other" in bfloat16 with room for 40 blocks: a few of its prompts at a time."""
    import cpu_engines

    with contextlib.closing(cpu_engines.load("other", cpu_engines.BF16, blocks=40)) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of chapters that the small Minitron was not trained on."""
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("\n\n".join(chapters), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_repository(
    tmp_path_factory: pytest.TempPathFactory, small_engine: Callable[[str], Path]
) -> Callable[[str], Path]:
    """``small_repository(precision)``: its rendered model repository, for four requests at once."""
    return _once_per_precision(tmp_path_factory, "repository", lambda precision, out: minitron(
        "render", small_engine(precision), "--output", out, "--bls-max-concurrency", "4"))  # fmt: skip


@pytest.fixture(scope="session")
def server(small_repository: Callable[[str], Path]) -> Iterator[dict[str, Any]]:
    """A server of the small Minitron in bfloat16, on free ports: its state document (``urls``: grpc, http, metrics).

    Every test of the session shares it, so none may stop it or leave a request behind.
    """
    from serving import server as serve

    with serve(small_repository("bfloat16")) as document:
        yield document


@pytest.fixture(scope="module")
def gateway(server: dict[str, Any]) -> Iterator[Any]:
    """A gateway before ``server``, which ends well when the file is through."""
    from gateway_process import Gateway

    one = Gateway("--upstream", server["urls"]["grpc"])
    yield one
    assert one.end()[0] == 0


@pytest.fixture(scope="session")
def echo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server whose engine says its prompt again and again (doubles/echo_engine.py) behind our own models.

    ``steps`` in its document: the file with a line for every request that ended in the engine.
    """
    import hand_made
    from serving import server as serve

    folder = tmp_path_factory.mktemp("echo")
    repository = hand_made.echo_repository(folder, postprocessing_instances=3)
    with serve(repository, "--exit-timeout", "10") as document:
        yield document | {"steps": repository / "tensorrt_llm" / "steps"}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start supervisors with ``tmp_path``/state; whatever a test leaves is stopped."""
    from supervisor import Supervisor

    started: list[Supervisor] = []

    def start(repository: Path, *flags: str | Path, ready: bool = True, **more: Any) -> Supervisor:
        one = Supervisor(repository, tmp_path / "state", *flags, **more)
        started.append(one)
        return one.wait_until_ready() if ready else one

    yield start
    for one in started:  # not gently: that takes seconds each, and is what some of the tests are about
        one.process.kill()
        one.process.communicate()
    minitron("stop", "--all", "--state", tmp_path / "state", check=False)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A repository with the one model of ``echo_repository``."""
    import echo_repository

    return echo_repository.write(tmp_path / "echo-repository")


def _once_per_precision(
    folders: pytest.TempPathFactory, stage: str, make: Callable[[str, Path], object]
) -> Callable[[str], Path]:
    """Makes the stage of each precision when it is first asked for: once, however many workers there are."""
    base = folders.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stages" / stage
    shared.mkdir(parents=True, exist_ok=True)

    def get(precision: str) -> Path:
        out = shared / f"small-{precision}"
        with (shared / f"{precision}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                make(precision, out)
        return out

    return get


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A process that speaks Triton's protocol and does what each prompt says (``bare_triton``)."""
    server = Bare(tmp_path_factory.mktemp("bare"))
    yield server
    server.end()


@pytest.fixture
def start_bare(tmp_path: Path) -> Iterator[Callable[..., Bare]]:
    """Starts such processes for one test."""
    servers: list[Bare] = []

    def start(*words: str) -> Bare:
        servers.append(Bare(tmp_path, *words))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority and what it signed, by openssl: server and client for 127.0.0.1, elsewhere for *.example.org and
    for servers alone, and expired, with server's key. locked.key is that key with a password."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority")
    for who, names in (("server", "IP:127.0.0.1"), ("client", "IP:127.0.0.1"), ("elsewhere", "DNS:*.example.org")):
        usage = "\nextendedKeyUsage=serverAuth" if who == "elsewhere" else ""
        (folder / "names").write_text(f"subjectAltName={names}{usage}")
        openssl("req", *new_key, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        openssl("x509", "-req", "-in", f"{who}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{who}.crt")  # fmt: skip
    (folder / "register").touch()
    (folder / "config").write_text(
        "[ca]\ndefault_ca=c\n[c]\ndatabase=register\nrand_serial=yes\ndefault_md=sha256\npolicy=p\n"
        "[p]\ncommonName=supplied\n"
    )
    of_2020 = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")
    openssl("ca", "-config", "config", "-batch", "-notext", "-outdir", ".", "-in", "server.csr", "-out", "expired.crt",
            "-cert", "ca.crt", "-keyfile", "ca.key", *of_2020)  # fmt: skip
    openssl("ec", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    return folder
