"""What ``minitron serve`` refuses before anything starts, and what render and check refuse because no server could.

Ports and limits are Triton's documentation's; numbers are worked out by hand beside the test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

import echo_repository
import hand_made
from conftest import minitron_here
from minitron.artifacts import manifest
from minitron.errors import MachineError, MissingDependency, NotEnoughMemory, PortBusy, RepositoryError, UsageError
from minitron.machine import memory
from minitron.recipe_model import Recipe
from minitron_cli import doctor
from minitron_triton.repository.check import check
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render
from minitron_triton.server import bundled, container, cpu_memory
from minitron_triton.server.launch import Options, Ports, Served
from minitron_triton.server.ports import Reservation


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
    ended, _, err = minitron_here("serve", echo, *(files.get(word, word) for word in words))
    assert (ended, err.count("\n")) == (code, 1), err
    assert said in err


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    code, _, err = minitron_here("serve", tmp_path)
    assert code == RepositoryError.exit_code
    assert "no repository made by minitron" in err
    code, _, err = minitron_here("serve", tmp_path / "nowhere")
    assert code == RepositoryError.exit_code
    assert "render" in err


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
        code, _, err = minitron_here("serve", echo, *map(str, words))
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


def test_no_shared_libpython_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependency, match=r"pip install '\.\[cpu\]' in the checkout"):
            bundled.find()
    with pytest.raises(MissingDependency, match=r"libpython3\.99.*enable-shared"):
        bundled._find_libpython("3.99")


def test_too_little_shared_memory(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"/dev/shm has 5 MiB free.*--shm-size"):
        bundled.check_machine(Served.read(echo))


@pytest.mark.parametrize(("mebibytes", "enough"), [(31, False), (32, True)])
def test_doctor_and_serve_want_as_much_shared_memory(
    mebibytes: int, enough: bool, echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 MiB, as docs/serving.md says. doctor once wanted 64."""
    usage = type("Usage", (), {"free": mebibytes << 20, "total": 1 << 40})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = {one.subject: one.level for one in doctor.diagnose(Recipe(target="cpu"), echo).checks}
    assert found["shared memory"] == (doctor.OK if enough else doctor.FAIL)
    with contextlib.nullcontext() if enough else pytest.raises(MachineError, match="/dev/shm has 31 MiB free"):
        bundled.check_machine(Served.read(echo))


def cpu_engine(folder: Path, execution: str = "exact", lm_head: str = "as_is") -> Path:
    """The config of an engine of the 4B shape (Minitron-4B-Base's config.json, int8), and a weight file of its size."""
    (folder / "openvino").mkdir(parents=True)
    with open(folder / "openvino" / "openvino_model.bin", "wb") as file:
        # By hand: 32 layers x 3,072 x (5,120 + 3,072 + 2 x 9,216), embedding and head of 256,000 x 3,072 in 16 bits.
        file.truncate(2_617_245_696 + 2 * 1_572_864_000)
    model = {
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "head_size": 128,
        "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 9216,
    }  # fmt: skip
    limits = {"max_seq_len": 100, "max_batch_size": 1, "max_num_tokens": 256}
    config = {"pretrained_config": model, "build_config": limits, "cpu": {"execution": execution, "lm_head": lm_head}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cpu_repository(folder: Path, **options: int) -> Path:
    """A repository of it, as far as its memory goes."""
    folder.mkdir()
    made_from = manifest.Input("engine", "x", "0" * 64)
    manifest.write(folder, "repository", made_from, arguments={"options": options}, details={})
    cpu_engine(folder / "engine")
    return folder


def test_memory_of_an_engine(tmp_path: Path) -> None:
    # 2 x 32 layers x 8 heads x 128 x 4 bytes = 262,144 bytes per token in float32; 76 kB in 8 bits (measured).
    exact = cpu_memory.sizes(cpu_engine(tmp_path / "exact"))
    assert (exact.weight_bytes, exact.kv_bytes(100)) == (4_190_109_696, 26_214_400)
    fast = cpu_memory.sizes(cpu_engine(tmp_path / "fast", "fast"))
    assert fast.kv_bytes(100) == pytest.approx(7_600_000, rel=0.01)
    with pytest.raises(RepositoryError, match="is no CPU engine's config"):
        cpu_memory.sizes(tmp_path)


def test_a_repository_says_its_cache_and_its_processes(tmp_path: Path) -> None:
    plain = cpu_memory.of_repository(cpu_repository(tmp_path / "plain"), 24 << 30)
    assert plain.kv_cache == 128 * 262_144  # one sequence of 100 tokens, in whole blocks of 32
    options = {"max_tokens_in_paged_kv_cache": 4096, "preprocessing_instances": 3, "postprocessing_instances": 2}
    more = cpu_memory.of_repository(cpu_repository(tmp_path / "more", **options), 24 << 30)
    assert more.kv_cache == 4096 * 262_144
    assert more.ensemble == 5 / 2 * plain.ensemble  # three and two processes, one of each without the options
    assert more.text > plain.text
    assert more.weights == plain.weights


def test_an_engine_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = cpu_repository(tmp_path / "repository")
    needed = cpu_memory.of_repository(repository, 24 << 30)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed.total)
    cpu_memory.check(repository)  # to the byte
    assert not caplog.text
    monkeypatch.setattr(memory, "available_bytes", lambda: needed.private)
    cpu_memory.check(repository)
    assert "loading takes 8.8" in caplog.text
    monkeypatch.setattr(memory, "available_bytes", lambda: needed.private - 1)
    with pytest.raises(NotEnoughMemory, match=r"4\.19 GB for its weights, 33\.6 MB for its KV cache .* are free"):
        cpu_memory.check(repository)


def test_a_control_group_may_leave_less_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 300\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert memory.available_bytes(tmp_path, tmp_path) == 400  # of 900 used, 300 are page cache
    assert memory.limit_bytes(tmp_path, tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path, tmp_path) == 8 * 1024
    assert memory.limit_bytes(tmp_path, tmp_path) == 9 * 1024


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


def test_without_docker_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"docker is not on PATH.*--dry-run"):
        container.check_machine(Served.read(echo_repository.write(tmp_path / "r")))


def test_a_folder_that_docker_cannot_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/docker")
    with pytest.raises(RepositoryError, match="holds a colon"):
        container.check_machine(Served.read(echo_repository.write(tmp_path / "a:b", backend="tensorrtllm")))
