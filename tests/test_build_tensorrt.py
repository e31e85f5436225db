"""Building for an A100 with a stand-in for trtllm-build (doubles/trtllm_build.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL, minitron
from minitron.artifacts import manifest
from minitron.errors import MinitronError, NotEnoughMemory, OutputExists, ToolError, UsageError
from minitron_build.engines.tensorrt import build
from minitron_cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def doubles(doubles: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared doubles, with docker's calls logged, in the folder that the test then works in."""
    monkeypatch.setenv("DOCKER_DOUBLE_LOG", str(doubles / "docker.log"))
    monkeypatch.chdir(doubles)
    return doubles


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main.main([str(word) for word in words])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return call


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's int8 checkpoint for two GPUs."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small-tp2"
    minitron("convert", SMALL_MODEL, "--output", folder, "--precision", "int8_weight_only", "--tp", "2")
    return folder


# --- building


PRECISION = {"a100-float16": "float16", "a100-int8": "int8_weight_only", "a100-int4": "int4_weight_only"}


@pytest.mark.parametrize("name", PRECISION)
def test_an_engine_is_built_then_found(name: str, small_checkpoint: Any, doubles: Path, run: Run) -> None:
    checkpoint = small_checkpoint(PRECISION[name])
    code, out, _ = run("build", checkpoint, "--recipe", name, "--json")
    assert code == 0
    made = json.loads(out)
    engine = doubles / made["output"]
    assert re.fullmatch(rf"out/engines/{checkpoint.name}-a100-(80|40)gb-[0-9a-f]{{12}}", made["output"])
    config = json.loads((engine / "config.json").read_text())
    assert set(config) == {"version", "pretrained_config", "build_config"}
    assert config["build_config"]["max_batch_size"] == made["limits"]["max_batch_size"]
    record = manifest.read(engine, "engine")
    assert set(record.files) >= {"config.json", "rank0.engine", "tokenizer/tokenizer.json"}
    assert ".timing.cache" not in record.files
    assert record.input.digest == manifest.read(checkpoint, "checkpoint").digest
    details = record.details
    assert (details["tensorrt_llm"], details["architecture"], details["precision"]) == (
        "1.2.1",
        "sm80",
        PRECISION[name],
    )
    assert details["plan"]["limits"] == details["limits"]
    assert details["kv_cache_free_gpu_mem_fraction"] == details["plan"]["kv_cache_free_gpu_mem_fraction"]
    assert details["build_peak_bytes"] > 1_000_000
    assert "rank 0 serialised" in engine.with_name(engine.name + ".build.log").read_text()
    code, out, _ = run("build", checkpoint, "--recipe", name)
    assert code == 0
    assert "is there already and is what was asked for" in out
    assert manifest.read(engine, "engine") == record


def test_ranks_are_built_side_by_side(two_ranks: Path, doubles: Path, run: Run) -> None:
    code, _, _ = run("build", two_ranks, "--recipe", "a100-int8", "--output", "engine")
    assert code == 0
    assert "building with 2 workers" in Path("engine.build.log").read_text()
    assert {path.name for path in Path("engine").glob("*.engine")} == {"rank0.engine", "rank1.engine"}
    assert run("build", two_ranks, "--recipe", "a100-int8", "--output", "one", "--workers", "1")[0] == 0


def test_the_timing_cache_is_kept_outside_the_current_folder(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "one")
    kept = doubles / "cache" / "minitron-trtllm" / "timing-tensorrt-llm-1.2.1-sm80.cache"
    assert kept.read_bytes() == b"timing cache"
    assert not list(doubles.glob("*.cache"))
    _, out, _ = run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "two", "--dry-run")
    assert f"--input_timing_cache {kept}" in out


def test_another_engine_at_the_output_is_refused_without_force(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    checkpoint = small_checkpoint("float16")
    assert run("build", checkpoint, "--recipe", "a100-float16", "--output", "engine")[0] == 0
    before = manifest.read(Path("engine"), "engine")
    other = ("build", checkpoint, "--recipe", "a100-float16", "--output", "engine", "--concurrency", "3")
    code, _, err = run(*other)
    assert code == OutputExists.exit_code
    assert "holds something else than the engine asked for" in err
    assert manifest.read(Path("engine"), "engine") == before
    assert run(*other, "--force")[0] == 0
    assert manifest.read(Path("engine"), "engine").details["limits"]["max_batch_size"] == 3


def test_a_damaged_engine_is_no_hit(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    words = ("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")
    assert run(*words)[0] == 0
    Path("engine", "rank0.engine").unlink()
    assert run(*words)[0] == OutputExists.exit_code
    assert run(*words, "--force")[0] == 0
    assert Path("engine", "rank0.engine").exists()


@pytest.mark.parametrize(
    "fault",
    [
        ("fail", ToolError, "Engine building failed"),
        ("killed", NotEnoughMemory, "was killed at"),
        ("cuda-out-of-memory", NotEnoughMemory, "CUDA out of memory"),
        ("missing-rank", ToolError, "wrote no rank0.engine"),
        ("no-config", ToolError, "without a config.json"),
        ("wrong:max_batch_size=8", ToolError, "max_batch_size 8, and 32 was asked"),
        ("wrong:max_seq_len=null", ToolError, "max_seq_len None, and 2048 was asked"),
        ("wrong:plugin_config={}", ToolError, "gemm_plugin None, and 'auto' was asked"),
    ],
    ids=lambda fault: fault[0],
)
def test_a_build_that_goes_wrong_leaves_no_engine(
    fault: tuple[str, type[MinitronError], str],
    small_checkpoint: Any,
    doubles: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how, kind, said = fault
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE", how)
    code, out, err = run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "out/engine")
    assert code == kind.exit_code
    assert said in err.splitlines()[-1]
    assert out == ""
    # What trtllm-build ended well with is kept for a look, with the reason; what it did not is gone.
    ended_well = not said.startswith(("Engine", "was", "CUDA"))
    left = ["engine.build.log", *(["engine.rejected"] if ended_well else [])]
    assert sorted(path.name for path in Path("out").iterdir()) == left
    if ended_well:
        assert said in (Path("out") / "engine.rejected" / "REJECTED.txt").read_text() and "engine.rejected" in err
    assert not (doubles / "cache" / "minitron-trtllm" / "timing-tensorrt-llm-1.2.1-sm80.cache").exists()


def test_an_engine_of_another_version_is_refused(
    small_checkpoint: Any, doubles: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE_VERSION", "1.1.0")
    code, _, err = run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")
    assert code == ToolError.exit_code
    assert "version '1.1.0', and '1.2.1' was asked" in err
    assert not Path("engine").exists() and Path("engine.rejected", "rank0.engine").exists()
    # The next one takes its place; what is not a rejected engine never makes room.
    assert run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")[0] == code
    Path("engine.rejected", "REJECTED.txt").unlink()
    _, _, err = run("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")
    assert "it was not kept" in err and Path("engine.rejected", "rank0.engine").exists()


def test_another_spelling_of_the_same_version_is_taken(
    small_checkpoint: Any, doubles: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the image of 25.11 calls its 1.0.3 (compat.yaml)."""
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE_VERSION", "1.2.1.2607")
    words = ("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")
    assert run(*words)[0] == 0 and run(*words)[1].startswith("engine is there already")


def test_a_build_that_hangs_is_stopped(
    small_checkpoint: Any, doubles: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_BUILD_DOUBLE", f"hang:{doubles}/pid")
    words = ("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine", "--timeout", "2")
    code, _, err = run(*words)
    assert code == ToolError.exit_code
    assert "did not end within 2 s" in err
    assert not Path("engine").exists()
    assert not alive(int(Path("pid").read_text()))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [(), ("--container",)])
def test_interrupting_ends_the_child_and_leaves_nothing(
    sign: signal.Signals, where: tuple[str, ...], small_checkpoint: Any, doubles: Path
) -> None:
    pid_file = doubles / "pid"
    words = ["build", str(small_checkpoint("float16")), "--recipe", "a100-float16", "--output", "engine", *where]
    environment = os.environ | {
        "TRTLLM_BUILD_DOUBLE": f"hang:{pid_file}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "minitron_cli", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
            child.send_signal(sign)
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()  # a failure must not wait for a build that hangs
    assert child.returncode == 130
    assert "interrupted" in err
    assert not Path("engine").exists()
    wait_for(lambda: not alive(int(pid_file.read_text())))
    if where:
        calls = [json.loads(line) for line in Path("docker.log").read_text().splitlines()]
        assert calls[1] == ["kill", next(word for word in calls[0] if word.startswith("--name=")).partition("=")[2]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- in the container


def test_the_container_gets_what_it_needs(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    code, _, _ = run("build", small_checkpoint("int8_weight_only"), "--recipe", "a100-int8", "--container",
                     "--output", "engine")  # fmt: skip
    assert code == 0
    (call,) = (json.loads(line) for line in Path("docker.log").read_text().splitlines())

    def value(flag: str) -> list[str]:
        return [word.partition("=")[2] for word in call if word.startswith(f"{flag}=")]

    assert value("--gpus") == ["all"]
    assert value("--ulimit") == ["memlock=-1", "stack=67108864"]
    assert value("--shm-size") == [str(2 << 30)]
    assert value("--user") == [f"{os.getuid()}:{os.getgid()}"]
    mounted = [volume.split(":")[1] for volume in value("--volume")]
    assert mounted == ["/checkpoint", "/engine", "/cache"]
    assert "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in call
    assert call[call.index("trtllm-build") + 1 :][:4] == ["--checkpoint_dir", "/checkpoint", "--output_dir", "/engine"]
    details = manifest.read(Path("engine"), "engine").details
    assert (details["tensorrt_llm"], details["image"]) == ("1.2.1", "26.07-trtllm-python-py3")
    assert {path.name for path in Path("engine").iterdir()} == {
        "config.json", "manifest.json", "rank0.engine", "tokenizer",
    }  # fmt: skip


def test_dry_run_prints_the_command_and_writes_nothing(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    words = ("build", small_checkpoint("int8_weight_only"), "--recipe", "a100-int8", "--output", "engine", "--dry-run")
    _, out, _ = run(*words)
    assert out.startswith("trtllm-build --checkpoint_dir ")
    assert out.count("\n") == 1
    _, out, _ = run(*words, "--container")
    assert out.startswith("docker run --rm ")
    _, out, _ = run(*words, "--json")
    assert json.loads(out)["argv"][0] == "trtllm-build"
    assert {path.name for path in doubles.iterdir()} == {"bin"}


def test_the_engine_is_rendered_for_the_image_that_built_it_only(
    small_checkpoint: Any, doubles: Path, run: Run
) -> None:
    run("build", small_checkpoint("int8_weight_only"), "--recipe", "a100-int8", "--output", "engine")
    render = ("render", "engine", "--output", "repository")
    code, _, err = run(*render, "--image-tag", "26.02-trtllm-python-py3")
    assert code == UsageError.exit_code
    assert "was built with TensorRT-LLM 1.2.1 and image 26.02-trtllm-python-py3 has 1.1.0" in err
    assert not Path("repository").exists()
    assert run(*render)[0] == 0
    config = Path("repository", "tensorrt_llm", "config.pbtxt").read_text()
    planned = manifest.read(Path("engine"), "engine").details["kv_cache_free_gpu_mem_fraction"]
    assert re.search(rf'"kv_cache_free_gpu_mem_fraction"\s*value:?\s*{{\s*string_value:\s*"{planned}"', config)


# --- what cannot be built


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--recipe", "a100-float16"), "holds precision int8_weight_only, and recipe a100-float16 says float16"),
        (("--recipe", "a100-int8", "--tp", "2"), "holds tensor_parallel 1, and flag --tp says 2"),
        (("--recipe", "a100-llmapi",), "backend llmapi needs no engine"),
        (("--recipe", "a100-int8", "--target", "h100-80gb"), "convert the model with --target h100-80gb (or"),
        (("--recipe", "a100-int8", "--image-tag", "27.01-trtllm-python-py3"), "not in compat.yaml"),
        (("--recipe", "a100-int8", "--max-seq-len", "4096"), "more than the 2048 positions"),
        (("--target", "cpu", "--container"), "are for GPU targets"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_are_refused(
    words: tuple[str, ...], said: str, small_checkpoint: Any, doubles: Path, run: Run
) -> None:
    code, _, err = run("build", small_checkpoint("int8_weight_only"), *words)
    assert code in (2, 3)
    assert said in err
    assert {path.name for path in doubles.iterdir()} == {"bin"}


def test_a_missing_trtllm_build_says_what_to_do(
    small_checkpoint: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", tmp_path / "engine")
    code, _, err = run(*words)
    assert code == 5
    assert "use --container" in err
    code, _, err = run(*words, "--container")
    assert code == 5
    assert "docker is not installed" in err
    assert not (tmp_path / "engine").exists()


def test_a_gpu_of_another_kind_is_refused(small_checkpoint: Any, doubles: Path, run: Run) -> None:
    smi = doubles / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0, 580.65.06'\n")
    smi.chmod(0o755)
    words = ("build", small_checkpoint("float16"), "--recipe", "a100-float16", "--output", "engine")
    code, _, err = run(*words)
    assert code == 5
    assert "compute capability 8.0 and the GPU here 9.0" in err
    smi.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.65.06'\n")
    assert run(*words)[0] == 0


def test_the_version_comes_from_the_python_that_runs_trtllm_build(doubles: Path) -> None:
    assert build.installed_version() is None  # the double's is a shell script
    fake = doubles / "python"
    fake.write_text("#!/bin/sh\necho 1.2.0\n")
    fake.chmod(0o755)
    (doubles / "bin" / "trtllm-build").write_text(f"#!{fake}\n")
    assert build.installed_version() == "1.2.0"


def test_a_gpu_with_another_layout_of_codes_gets_floats_to_quantise(doubles: Path, run: Run) -> None:
    """sm90 reads codes that only its own operation makes; a 4090 is sm89 and reads those of an A100."""
    for target, left_to_build in (("h100-80gb", True), ("h200-141gb", True), ("rtx4090-24gb", False)):
        flags = ("--precision", "int8_weight_only", "--target", target)
        code, _, err = run("convert", SMALL_MODEL, "--output", target, *flags)
        assert code == 0, err
        assert manifest.read(Path(target), "checkpoint").details["quantize_at_build"] == left_to_build
        assert run("build", target, "--target", target, "--output", f"engine-{target}")[0] == 0
