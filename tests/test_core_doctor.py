"""doctor: what is missing is named with its remedy; GPU, driver and docker are played by small programs on PATH."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from pathlib import Path

import pytest

import cpu_engines
from conftest import ROOT, minitron
from minitron import recipe
from minitron.errors import MachineError, RepositoryError, UsageError
from minitron.machine import compat, gpus_here, memory
from minitron.model.precision import Precision
from minitron_cli.doctor import FAIL, OK, WARN, Diagnosis, Requirement, diagnose
from minitron_triton.server import bundled

A100 = "NVIDIA A100-SXM4-80GB, 81920, 8.0, 590.44.01"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds only what a test puts into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def put_gpu_machine(folder: Path, gpus: str = A100) -> None:
    put(folder, "nvidia-smi", f"echo '{gpus}'")
    put(folder, "docker", """case $1 in version) echo 28.0.1;; info) echo '{"nvidia":{},"runc":{}}';; esac""")


def diagnosed(name: str, **flags: object) -> Diagnosis:
    return diagnose(recipe.load(name, {}, flags).recipe, Path.cwd())


def of(found: Diagnosis, subject: str) -> Requirement:
    return next(check for check in found.checks if check.subject == subject)


def test_without_a_gpu_the_cpu_path_is_what_can_run(programs: Path) -> None:
    found = diagnosed("cpu")
    assert found.healthy
    assert of(found, "GPU").level == WARN
    assert any("build and serve for target cpu" in line for line in found.can)
    assert any("a100" in line for line in found.cannot)


@pytest.mark.parametrize(
    ("what", "is_", "why"),
    [("machine", "aarch64", "has been run on Linux x86_64 alone, and this is Linux aarch64"),
     ("libc_ver", ("glibc", "2.31"), "needs glibc 2.35 or newer and this is glibc 2.31"),
     ("libc_ver", ("", ""), "needs glibc 2.35 or newer and this is another C library")],
)  # fmt: skip
def test_doctor_and_the_bundled_server_agree_on_where_it_runs(
    what: str, is_: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel of nvidia-pytriton 0.7.0 is tagged manylinux_2_35; the one for aarch64 was never tried."""
    monkeypatch.setattr(platform, what, lambda: is_)
    found = diagnosed("cpu")
    assert why in of(found, "system").remedy
    assert any("build and serve for target cpu" in line for line in found.cannot)
    with pytest.raises(MachineError, match=why):
        bundled.find()


def test_a_gpu_recipe_without_a_gpu_fails_with_remedies(programs: Path) -> None:
    found = diagnosed("a100-int8")
    assert not found.healthy
    assert {check.subject for check in found.checks if check.level == FAIL} == {"GPU", "docker"}
    assert all(check.remedy for check in found.checks if check.level != OK)
    assert any("a100-80gb" in line for line in found.cannot)
    assert any(line.startswith("plan, convert") for line in found.can)


def test_an_a100_machine_is_fine(programs: Path) -> None:
    put_gpu_machine(programs)
    found = diagnosed("a100-int8")
    assert found.healthy
    for subject in ("GPU", "GPU memory", "driver", "docker", "NVIDIA runtime"):
        assert of(found, subject).level == OK
    assert any("a100-80gb" in line for line in found.can)


BOARD = {"name": "NVIDIA A100-SXM4-80GB", "mib": 81920, "capability": "8.0"}
HALF = [["3g.40gb", 40192, 42], ["3g.40gb", 40192, 42]]


def put_boards(folder: Path, monkeypatch: pytest.MonkeyPatch, *boards: dict[str, object]) -> None:
    """A machine with docker and these boards (doubles/nvidia_smi.py)."""
    put_gpu_machine(folder)
    put(folder, "nvidia-smi", f'exec {sys.executable} {ROOT}/tests/doubles/nvidia_smi.py "$@"')
    monkeypatch.setenv("NVIDIA_SMI_DOUBLE", json.dumps(boards))


@pytest.mark.parametrize(
    ("board", "target", "found"),
    [
        ({}, "a100-80gb", (OK, "85.90 GB")),
        ({"mig": HALF}, "a100-80gb", (FAIL, "a100-80gb-3g.40gb, a100-80gb-pcie-3g.40gb")),
        ({"mig": HALF}, "a100-80gb-3g.40gb", (OK, "42.14 GB")),
        ({"mig": []}, "a100-80gb", (FAIL, "nvidia-smi mig -cgi")),
        ({"mib": 40960, "virtualization": "VGPU"}, "a100-80gb", (WARN, "a vGPU has the memory of its profile")),
    ],
)
def test_what_a_divided_board_gives_is_what_counts(
    programs: Path, monkeypatch: pytest.MonkeyPatch, board: dict[str, object], target: str, found: tuple[str, str]
) -> None:
    put_boards(programs, monkeypatch, BOARD | board)
    level, said = found
    memory = of(diagnosed("a100-bfloat16", target=target), "GPU memory")
    assert memory.level == level and said in f"{memory.message} {memory.remedy}"


def test_the_slice_and_its_processors_are_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_boards(programs, monkeypatch, BOARD, BOARD | {"mig": HALF})
    assert [(gpu.memory_bytes >> 20, gpu.mig, gpu.profile, gpu.multiprocessors) for gpu in gpus_here.gpus()] == [
        (81920, False, "", None), (40192, True, "3g.40gb", 42), (40192, True, "3g.40gb", 42),
    ]  # fmt: skip
    assert "MIG 3g.40gb, 42 SMs" in of(diagnosed("a100-bfloat16"), "GPU").message


@pytest.mark.parametrize(
    ("gpus", "subject", "level", "said"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 9.0, 590.44.01", "GPU", FAIL, "compute capability 8.0"),
        ("NVIDIA A100-SXM4-40GB, 40960, 8.0, 590.44.01", "GPU memory", WARN, "choose a smaller target"),
        ("NVIDIA A100-SXM4-80GB, 81920, 8.0, 575.57.08", "driver", FAIL, "25.10-trtllm-python-py3"),
    ],
)
def test_a_gpu_that_does_not_fit_is_named(programs: Path, gpus: str, subject: str, level: str, said: str) -> None:
    put_gpu_machine(programs, gpus)
    check = of(diagnosed("a100-int8"), subject)
    assert check.level == level
    assert said in check.remedy


def test_an_older_image_takes_an_older_driver(programs: Path) -> None:
    put_gpu_machine(programs, "NVIDIA A100-SXM4-80GB, 81920, 8.0, 575.57.08")
    assert diagnosed("a100-int8", **{"container.image_tag": "25.10-trtllm-python-py3"}).healthy


def test_two_ranks_need_two_gpus(programs: Path) -> None:
    put_gpu_machine(programs)
    assert of(diagnosed("a100-int8", tensor_parallel=2), "GPU").level == FAIL
    put_gpu_machine(programs, f"{A100}\n{A100}")
    assert of(diagnosed("a100-int8", tensor_parallel=2), "GPU").level == OK


def test_docker_without_its_daemon_or_without_nvidia_is_told_apart(programs: Path) -> None:
    put_gpu_machine(programs)
    put(programs, "docker", "exit 1")
    assert "daemon does not answer" in of(diagnosed("a100-int8"), "docker").message
    put(programs, "docker", """case $1 in version) echo 28.0.1;; info) echo '{"runc":{}}';; esac""")
    assert of(diagnosed("a100-int8"), "NVIDIA runtime").level == FAIL


def test_inside_the_image_no_docker_is_needed(programs: Path) -> None:
    put_gpu_machine(programs)
    (programs / "docker").unlink()
    assert not diagnosed("a100-int8").healthy
    put(programs, "trtllm-build", "")
    found = diagnosed("a100-int8")
    assert found.healthy
    assert of(found, "docker").level == WARN


def test_a_busy_port_is_named(programs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = of(diagnosed("cpu", **{"serving.grpc_port": port}), "grpc port")
    assert check.level == WARN
    assert str(port) in check.message


def test_the_command_exits_by_its_findings(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{Path(sys.executable).parent}")
    assert minitron("doctor", "--recipe", "cpu").returncode == 0
    done = minitron("doctor", "--recipe", "a100-int8", "--json", check=False)
    assert done.returncode == 5
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert {check["level"] for check in document["checks"]} <= {OK, WARN, FAIL}
    assert document["can"] and document["cannot"]


# --- compat.yaml. Rows from Triton's docs/introduction/compatibility.md (r26.08), tensorrtllm_backend's Docker files


def test_the_default_image_is_the_newest_that_builds_engines() -> None:
    image = compat.image()
    assert image.reference == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert (image.server, image.tensorrt_llm, image.tensorrt, image.cuda, image.driver) == (
        "2.71", "1.2.1", "10.14.1.48", "13.1.0", "590.44.01",
    )  # fmt: skip
    assert compat.images()[0] == image
    assert [each.tag[:5] for each in compat.images() if each.tensorrt_llm == "1.2.1"] == [
        "26.07", "26.06", "26.05", "26.04",
    ]  # fmt: skip
    assert (image.least_driver, compat.image("25.10-trtllm-python-py3").least_driver) == ("580", "525.60.13")


@pytest.mark.parametrize(
    ("version", "engines"), [("1.2.1", True), ("0.21.0", True), ("1.3.0", False), ("1.3.0rc21", False), ("2.0", False)]
)
def test_the_engine_path_ends_before_1_3(version: str, engines: bool) -> None:
    assert compat.has_engine_path(version) is engines


def test_combinations_that_are_ruled_out_are_refused() -> None:
    engine = {"tensorrt_llm": "1.2.1", "architecture": "sm80"}
    newest = compat.image()
    compat.check_engine(engine, "engine", newest, "8.0")
    compat.check_engine(engine, "engine", compat.image("26.04-trtllm-python-py3"))
    compat.check_engine({}, "engine", newest, "9.0")  # a CPU engine
    with pytest.raises(UsageError, match=r"built with TensorRT-LLM 1\.2\.1 and image 26\.02-.* has 1\.1\.0"):
        compat.check_engine(engine, "engine", compat.image("26.02-trtllm-python-py3"))
    with pytest.raises(UsageError, match=r"built for sm80 and this GPU has compute capability 9\.0"):
        compat.check_engine(engine, "engine", newest, "9.0")
    with pytest.raises(UsageError, match=r"not in compat\.yaml"):
        compat.image("27.01-trtllm-python-py3")


def test_an_image_without_the_engine_path_points_to_llmapi() -> None:
    gone = compat.Image("27.01-trtllm-python-py3", None, "1.3.0", "11.0", "13.2.0", "600.0", engine_path=False)
    with pytest.raises(UsageError, match="--backend llmapi"):
        compat.check_can_build(gone)
    with pytest.raises(UsageError, match="--backend llmapi"):
        compat.check_engine({"tensorrt_llm": "1.2.1", "architecture": "sm80"}, "engine", gone)


def test_memory_of_a_recipe_and_of_an_engine(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 weights as executed of the published model are 4.19 GB (docs/plan.md), twice that while it loads."""
    engine = cpu_engines.engine("small", Precision.INT8_WEIGHT_ONLY)
    wanted = recipe.load("cpu", {}).recipe
    monkeypatch.setattr(memory, "available_bytes", lambda: 6_000_000_000)
    found = of(diagnose(wanted, Path.cwd()), "memory")
    assert found.level == WARN and "at its peak" in found.message and "load slowly" in found.remedy
    assert of(diagnose(wanted, Path.cwd(), engine), "memory").level == OK
    monkeypatch.setattr(memory, "available_bytes", lambda: 50_000_000)
    found = of(diagnose(wanted, Path.cwd(), engine), "memory")
    assert found.level == FAIL and "a smaller model" in found.remedy
    with pytest.raises(RepositoryError, match="no CPU engine's config"):
        diagnose(wanted, Path.cwd(), tmp_path)
    done = minitron("doctor", "--recipe", "a100-int8", "--engine", str(engine), check=False)
    assert done.returncode == UsageError.exit_code and "--engine is of target cpu" in done.stderr
