"""``minitron accept``: whole on a CPU, and on a machine with an A100 that doubles play, each made to disagree once.

The doubles are doubles/docker_a100.py (docker), doubles/trtllm_build.py and doubles/image (the TensorRT-LLM package);
the server behind them is the real Triton, with the CPU engine in the slot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL, minitron
from minitron_trtllm.acceptance.lines import catalogue
from minitron_trtllm.conformance import suite

pytestmark = pytest.mark.server

GPU_LINES = {name for name, entry in catalogue().items() if entry.gpu}
GRID = ("16:8:1", "16:8:2", "16:8:3")


def accepted(output: Path, *words: str | Path) -> dict[str, Any]:
    """Run it and read the document; the exit code must fit it."""
    done = minitron(
        "accept", "--model", SMALL_MODEL, "--output", output, "--grid", *GRID, "--json", *words, check=False
    )
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document == json.loads((output / "acceptance.json").read_text())
    assert done.returncode == (8 if document["verdict"] == "FAIL" else 0)
    return document


def lines_of(document: dict[str, Any], status: str) -> dict[str, str]:
    """Evidence of the lines with that status."""
    return {line["id"]: line["evidence"] for line in document["lines"] if line["status"] == status}


def seconds_of(output: Path) -> dict[str, Any]:
    """When each step was done: the whole record of steps."""
    record: dict[str, Any] = json.loads((output / "evidence" / "steps.json").read_text())
    return record


def slow(point: str) -> dict[str, Any]:
    """A point of a 16-bit run at one token a second."""
    sizes = dict(zip(("input_tokens", "output_tokens", "concurrency"), map(int, point.split(":")), strict=True))
    return {"point": sizes, "tokens_per_s": {"value": 1.0, "low": None, "high": None}, "metrics": {}}


def sixteen_bit_run(path: Path) -> Path:
    """A stored 16-bit run of one token a second."""
    path.write_text(json.dumps({"kind": "latency", "schema": 1, "points": [slow(point) for point in GRID]}))
    return path


@pytest.fixture(scope="module", autouse=True)
def few_lines() -> Iterator[None]:
    """Four requests at once in every server here: Triton takes a second to end each line of the front."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRON_RECIPE_SERVING_BLS_MAX_CONCURRENCY", "4")
        yield


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An acceptance of recipe cpu, done."""
    output = tmp_path_factory.mktemp("accept") / "cpu"
    accepted(output, "--recipe", "cpu")
    return output


def test_the_catalogue_is_what_is_judged() -> None:
    behaviour = {name for name, entry in catalogue().items() if entry.step == "behaviour"}
    assert behaviour == set(suite.CASES)
    page = (ROOT / "docs" / "a100.md").read_text(encoding="utf-8")
    assert [name for name in catalogue() if f"`{name}`" not in page] == []


def test_on_a_cpu_it_runs_whole_and_what_needs_a_gpu_is_skipped(on_cpu: Path) -> None:
    document = json.loads((on_cpu / "acceptance.json").read_text())
    assert document["verdict"] == "PASS" and document["finished"]
    assert [line["id"] for line in document["lines"]] == list(catalogue())
    assert set(lines_of(document, "SKIPPED")) == GPU_LINES
    assert set(lines_of(document, "PASS")) == set(catalogue()) - GPU_LINES
    tokens = json.loads((on_cpu / "evidence" / "greedy-tokens.json").read_text())
    assert len(tokens["continuations"]) == 20
    page = (on_cpu / "acceptance.html").read_text()
    assert all(name in page for name in catalogue())
    assert "://" not in page.replace("data:,", "")


def test_what_is_finished_is_not_done_again(on_cpu: Path) -> None:
    before, log = seconds_of(on_cpu), (on_cpu / "evidence" / "behaviour.log").stat().st_mtime_ns
    assert accepted(on_cpu, "--recipe", "cpu")["verdict"] == "PASS"
    assert seconds_of(on_cpu) == before
    assert (on_cpu / "evidence" / "behaviour.log").stat().st_mtime_ns == log


def test_interrupted_it_goes_on_where_it_was(on_cpu: Path, tmp_path: Path) -> None:
    """Killed in three places (the steps take 30 s): every step that was recorded is kept, and no server is left."""
    output = tmp_path / "cpu"
    given = ("--recipe", "cpu", "--baseline", sixteen_bit_run(tmp_path / "baseline.json"))
    words = ["accept", "--model", str(SMALL_MODEL), "--output", str(output), "--grid", *GRID, *map(str, given)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)}
    for step, number in (("checkpoint", signal.SIGINT), ("serve", signal.SIGTERM), ("tokens", signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron_trtllm.cli", *words], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_step(output, step)
        process.send_signal(number)
        assert process.wait(60) == (130 if number != signal.SIGKILL else -signal.SIGKILL)
        kept = seconds_of(output)
        assert step in kept
        assert not json.loads((output / "acceptance.json").read_text())["finished"]
    document = accepted(output, *given)
    assert document["verdict"] == "PASS"
    after = seconds_of(output)
    assert {step: after[step] for step in kept} == kept
    assert not list((output / "evidence" / "servers").glob("*"))


def test_another_input_makes_the_steps_that_depend_on_it(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seconds_of(on_cpu)
    monkeypatch.setenv("MINITRON_RECIPE_SERVING_MAX_QUEUE_SIZE", "32")
    document = accepted(on_cpu, "--recipe", "cpu")
    assert document["verdict"] == "PASS"
    assert "queue of 32" in lines_of(document, "PASS")["behaviour.queue_full"]
    after = seconds_of(on_cpu)
    assert {step for step in before if after[step]["key"] == before[step]["key"]} == {"checkpoint", "engine"}


def wait_for_step(output: Path, step: str) -> None:
    """Until a step is recorded as done."""
    deadline = time.monotonic() + 240
    while not (output / "evidence" / "steps.json").exists() or step not in seconds_of(output):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class A100:
    """A machine with an A100: its doubles' folder, and the acceptance that was made there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "accept"
        self.runtime: dict[str, Any] = {}

    def accept(self, *again: str) -> dict[str, Any]:
        """Run the acceptance; steps named in ``again`` are forgotten first."""
        steps = self.output / "evidence" / "steps.json"
        if steps.exists():
            record = {name: one for name, one in json.loads(steps.read_text()).items() if name not in again}
            steps.write_text(json.dumps(record))
        (self.folder / "runtime.json").write_text(json.dumps(self.runtime))
        return accepted(self.output, "--recipe", "a100-int8", "--baseline", self.folder / "baseline.json")

    @contextlib.contextmanager
    def evidence_kept(self) -> Iterator[None]:
        """What steps leave meanwhile, and a change of the double's tokens, are undone."""
        evidence, kept = self.output / "evidence", self.folder / "kept"
        shutil.copytree(evidence, kept)
        try:
            yield
        finally:
            (self.folder / "change.json").unlink(missing_ok=True)
            shutil.rmtree(evidence)
            kept.rename(evidence)

    def calls(self) -> list[list[str]]:
        """Every command line that docker got."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


def plan_of_the_recipe() -> dict[str, Any]:
    """What the runtime of the double reports: exactly the plan."""
    plan = json.loads(minitron("plan", "--recipe", "a100-int8", "--model", SMALL_MODEL, "--json").stdout)
    memory, limits = plan["memory"], plan["limits"]
    tokens = int(memory["free_bytes"] * plan["kv_cache_free_gpu_mem_fraction"]) // memory["kv_bytes_per_token"]
    return {
        "limits": {"maxBatchSize": limits["max_batch_size"], "maxBeamWidth": 1, "maxSequenceLen": limits["max_seq_len"],
                   "maxNumTokens": limits["max_num_tokens"]},
        "engine_mib": -(-memory["weight_bytes"] >> 20), "context_mib": memory["activation_bytes"] / (1 << 20),
        "kv_gib": tokens * memory["kv_bytes_per_token"] / (1 << 30), "kv_tokens": tokens,
    }  # fmt: skip


@pytest.fixture(scope="module")
def a100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[A100]:
    """A machine of doubles on which an acceptance ran, with a given 16-bit run and a reference made there."""
    folder = tmp_path_factory.mktemp("a100")
    programs = folder / "bin"
    programs.mkdir()
    double = f"{sys.executable} {ROOT}/tests/doubles"
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    for name, command in (
        ("trtllm-build", f'exec {double}/trtllm_build.py "$@"'),
        ("docker", f'PYTHONPATH={rooms} exec {double}/docker_a100.py "$@"'),
        ("python3", f'exec {sys.executable} "$@"'),
        ("nvidia-smi", "echo NVIDIA A100-SXM4-80GB, 81920, 8.0, 590.44.01"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("A100_DOUBLE", str(folder))
        patch.setenv("MINITRON_RECIPE_SERVING_EXECUTOR_QUEUE_POLICY", "true")  # so that no line is skipped
        machine = A100(folder)
        machine.runtime = plan_of_the_recipe()
        sixteen_bit_run(folder / "baseline.json")
        minitron("convert", SMALL_MODEL, "--recipe", "a100-int8", "--output", folder / "checkpoint")
        cpu = ("--recipe", "a100-int8", "--target", "cpu")
        minitron("build", folder / "checkpoint", *cpu, "--output", folder / "engine")
        minitron("repo", "render", folder / "engine", "--recipe", "a100-int8", "--output", folder / "repository")
        machine.accept()
        yield machine


def test_on_an_a100_of_doubles_every_line_passes(a100: A100) -> None:
    document = json.loads((a100.output / "acceptance.json").read_text())
    assert lines_of(document, "FAIL") == {}
    assert lines_of(document, "SKIPPED") == {}
    evidence = lines_of(document, "PASS")
    assert evidence["words.same"].startswith("20 of 20 prompts equal")
    assert "answered (utils.cc" in evidence["behaviour.bad_words"]
    runs = [call for call in a100.calls() if call[0] == "run"]
    assert all("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in call for call in runs)
    assert sum("trtllm-build" in call for call in runs) == 1


Disagree = Callable[[A100, pytest.MonkeyPatch], None]


def _set(name: str, value: str) -> Disagree:
    return lambda a100, patch: patch.setenv(name, value)


def _runtime(**changes: Any) -> Disagree:
    return lambda a100, patch: patch.setattr(a100, "runtime", a100.runtime | changes)


def _half_the_kv_tokens(a100: A100, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(a100, "runtime", a100.runtime | {"kv_tokens": a100.runtime["kv_tokens"] // 2})


def _a_token(a100: A100, patch: pytest.MonkeyPatch) -> None:
    """Where the reference is sure of its token."""
    reference = json.loads((a100.output / "evidence" / "reference-greedy-tokens.json").read_text())
    surest, place, one = max(
        (log_prob, place, one)
        for number, one in enumerate(reference["continuations"])
        for place, log_prob in enumerate(one["log_probs"])
        for one in [number]
    )
    continuation = reference["continuations"][one]
    assert surest > -0.1
    other = (continuation["token_ids"][place] + 1) % 1024
    change = {"prompt": continuation["input_ids"], "place": place, "token": other}
    (a100.folder / "change.json").write_text(json.dumps(change))


DISAGREEMENTS: dict[str, tuple[Disagree, tuple[str, ...], str, str]] = {
    "a missing flag": (
        _set("TRTLLM_BUILD_DOUBLE_HELP", "without:reduce_fusion"), ("tool",), "tool.flags", "--reduce_fusion is not"),
    "a changed default": (
        _set("TRTLLM_BUILD_DOUBLE_HELP", "default:max_num_tokens=4096"), ("tool",), "tool.defaults",
        "--max_num_tokens has default 4096, and 8192 was expected"),
    "another TensorRT-LLM": (
        _set("TRTLLM_BUILD_DOUBLE_VERSION", "1.3.0"), ("tool",), "tool.versions", "tensorrt_llm is 1.3.0"),
    "a refused checkpoint": (
        _set("IMAGE_DOUBLE", "load"), ("checkpoint",), "checkpoint.loads", "Required but not provided"),
    "a config key dropped": (
        _set("IMAGE_DOUBLE", "config:rotary_pct"), ("checkpoint",), "checkpoint.config", "rotary_pct is not read back"),
    "a code off by one": (
        _set("IMAGE_DOUBLE", "code"), ("checkpoint",), "checkpoint.codes",
        "layers.0.attention.qkv.weight differs in 1 of"),
    "a different scale": (
        _set("IMAGE_DOUBLE", "scale"), ("checkpoint",), "checkpoint.scales", "qkv.per_channel_scale differs in"),
    "memory off by half": (_half_the_kv_tokens, ("audit",), "audit.kv_tokens", "more than 10% below"),
    "a workspace beyond the plan": (
        _runtime(context_mib=8000.0), ("audit",), "audit.workspace", "execution context 8.39 GB"),
    "an engine larger than its weights": (_runtime(engine_mib=900), ("audit",), "audit.weights", "engine 943.7 MB"),
    "a parameter that was not read": (
        _runtime(warnings=["enable_chunked_context is not specified, will be set to false."]), ("audit",),
        "audit.parameters", "enable_chunked_context was rendered as 'true'"),
    "a limit read otherwise": (
        _runtime(limits={"maxNumTokens": 16}), ("audit",), "audit.parameters", "max_num_tokens is 16 in the runtime"),
    "a token changed": (_a_token, ("tokens", "words"), "words.same", "no near tie"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_double_that_disagrees_fails_exactly_its_line(a100: A100, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disagree, again, line, said = DISAGREEMENTS[name]
    disagree(a100, monkeypatch)
    with a100.evidence_kept():
        failed = lines_of(a100.accept(*again), "FAIL")
    assert list(failed) == [line]
    assert said in failed[line]
    page = (a100.output / "acceptance.html").read_text()
    assert catalogue()[line].remedy.split(":")[0].replace("'", "&#39;") in page


def test_a_stored_reference_counts_for_its_own_checkpoint_alone(a100: A100, on_cpu: Path, tmp_path: Path) -> None:
    """The recipes cpu and a100-int8 make the same checkpoint of the small Minitron, which is in bfloat16."""
    words = ("--recipe", "a100-int8", "--baseline", a100.folder / "baseline.json", "--reference")
    evidence = lines_of(accepted(a100.output, *words, on_cpu), "PASS")
    assert str(on_cpu) in evidence["words.reference"]
    assert evidence["words.same"].startswith("20 of 20 prompts equal")
    tokens = json.loads((on_cpu / "evidence" / "greedy-tokens.json").read_text())
    (tmp_path / "greedy-tokens.json").write_text(json.dumps(tokens | {"checkpoint": "0" * 64}))
    document = accepted(a100.output, *words, tmp_path)
    assert "is of checkpoint 0000000000000000" in lines_of(document, "FAIL")["words.reference"]
    assert lines_of(document, "SKIPPED")["words.same"] == "step reference failed"


def test_without_docker_what_needs_it_is_skipped_and_never_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither docker nor nvidia-smi
    document = accepted(tmp_path / "out", "--recipe", "a100-int8")
    assert set(lines_of(document, "FAIL")) == {"machine.ready"}
    assert lines_of(document, "SKIPPED")["tool.flags"] == "step machine failed"
    assert set(lines_of(document, "PASS")) == {"convert.done", "checkpoint.whole"}


def test_llmapi_has_nothing_to_accept() -> None:
    done = minitron("accept", "--recipe", "a100-llmapi", check=False)
    assert done.returncode == 2 and "llmapi" in done.stderr
