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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOMS, ROOT, SMALL_MODEL, minitron_here
from minitron.checks import catalogue
from minitron_cli.accept import hour, speed
from minitron_client.conformance import suite
from serving import server as serving

pytestmark = [pytest.mark.server, pytest.mark.slow]

GPU_LINES = {name for name, entry in catalogue().items() if entry.gpu}
GRID = ("16:8:1", "16:8:2", "16:8:3")
#: The point of a long prompt that every run has beside its grid.
PREFILL = "1024:2:1"


def called(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """``minitron WORDS`` in this process."""
    code, out, said = minitron_here(*words)
    return subprocess.CompletedProcess(words, code, out, said)


def accepted(output: Path, *words: str | Path) -> dict[str, Any]:
    """Run it, and read the document; the exit code must fit it."""
    done = called("accept", "--model", SMALL_MODEL, "--output", output, "--grid", *GRID, "--json", *words)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document == json.loads((output / "acceptance.json").read_text())
    assert done.returncode == (8 if document["verdict"] == "FAIL" else 0)
    return document


def lines_of(document: dict[str, Any], status: str) -> dict[str, str]:
    """Evidence of the lines with that status."""
    return {line["id"]: line["evidence"] for line in document["lines"] if line["status"] == status}


def steps_of(output: Path) -> dict[str, Any]:
    """When each step was done: the whole record of steps."""
    record: dict[str, Any] = json.loads((output / "evidence" / "steps.json").read_text())
    return record


def slow(point: str) -> dict[str, Any]:
    """A point of a 16-bit run at one token a second."""
    sizes = dict(zip(("input_tokens", "output_tokens", "concurrency"), map(int, point.split(":")), strict=True))
    ttft = {"ttft_ms": {"p50": {"value": 1e6, "low": None, "high": None}}}
    return {"point": sizes, "tokens_per_s": {"value": 1.0, "low": None, "high": None}, "metrics": ttft}


def sixteen_bit_run(path: Path) -> Path:
    """A stored 16-bit run of one token a second."""
    path.write_text(json.dumps({"kind": "latency", "schema": 1, "points": [slow(point) for point in (*GRID, PREFILL)]}))
    return path


@dataclass
class Killed:
    """An acceptance that got a signal once ``step`` was recorded: its exit code, what it had recorded, its document."""

    step: str
    number: signal.Signals
    code: int
    steps: dict[str, Any]
    finished: bool


@dataclass
class OnCpu:
    """An acceptance of recipe cpu: ended three times on its way, then finished with another size of the queue."""

    output: Path
    killed: list[Killed] = field(default_factory=list)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> OnCpu:
    """It is a process of its own until the last start, as a user's is."""
    made = OnCpu(tmp_path_factory.mktemp("accept") / "cpu")
    words = ["accept", "--model", str(SMALL_MODEL), "--output", str(made.output), "--grid", *GRID, "--recipe", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)}
    ends = (("checkpoint", signal.SIGINT), ("serve", signal.SIGTERM), ("tokens", signal.SIGKILL))
    for step, number in ends:
        process = subprocess.Popen(
            [sys.executable, "-m", "minitron_cli", *words], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_step(made.output, step, process)
        process.send_signal(number)
        code = process.wait(300)
        document = json.loads((made.output / "acceptance.json").read_text())
        made.killed.append(Killed(step, number, code, steps_of(made.output), document["finished"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRON_RECIPE_SERVING_MAX_QUEUE_SIZE", "32")
        accepted(made.output, "--recipe", "cpu")
    return made


def wait_for_step(output: Path, step: str, process: subprocess.Popen[bytes]) -> None:
    """Until a step is recorded as done."""
    while not (output / "evidence" / "steps.json").exists() or step not in steps_of(output):
        assert process.poll() is None, f"it ended before step {step}"
        time.sleep(0.02)


def test_the_catalogue_is_what_is_judged() -> None:
    behaviour = {name for name, entry in catalogue().items() if entry.step == "behaviour"}
    assert behaviour == set(suite.CASES)
    page = (ROOT / "docs" / "a100.md").read_text(encoding="utf-8")
    assert [name for name in catalogue() if f"`{name}`" not in page] == []


def test_on_a_cpu_it_runs_whole_and_what_needs_a_gpu_is_skipped(on_cpu: OnCpu) -> None:
    document = json.loads((on_cpu.output / "acceptance.json").read_text())
    assert document["verdict"] == "PASS" and document["finished"]
    assert [line["id"] for line in document["lines"]] == list(catalogue())
    # Recipe cpu serves prompts of 512 tokens; no tasks were given.
    skipped = set(lines_of(document, "SKIPPED"))
    # An engine may be too fast for a client to give up in the middle of its longest answer.
    assert skipped - {"behaviour.deadline"} == GPU_LINES | {"behaviour.long_prompt", "tasks.gate"}
    assert set(lines_of(document, "PASS")) == set(catalogue()) - skipped
    tokens = json.loads((on_cpu.output / "evidence" / "greedy-tokens.json").read_text())
    assert len(tokens["continuations"]) == 20
    page = (on_cpu.output / "acceptance.html").read_text()
    assert all(name in page for name in catalogue())
    assert "://" not in page.replace("data:,", "")


def test_interrupted_it_goes_on_where_it_was(on_cpu: OnCpu) -> None:
    """Ended in three places: every step that was recorded is kept, and no server is left."""
    for one in on_cpu.killed:
        assert one.code == (130 if one.number != signal.SIGKILL else -signal.SIGKILL)
        assert one.step in one.steps and not one.finished
    for before, after in zip(on_cpu.killed, on_cpu.killed[1:], strict=False):
        assert {step: after.steps[step] for step in before.steps} == before.steps
    assert not list((on_cpu.output / "evidence" / "servers").glob("*"))


def test_another_input_makes_the_steps_that_depend_on_it(on_cpu: OnCpu) -> None:
    """The size of the queue: in the recipe, which the machine is judged by, and in the repository."""
    before, after = on_cpu.killed[-1].steps, steps_of(on_cpu.output)
    assert set(before) == {"machine", "checkpoint", "engine", "repository", "serve", "audit", "tokens"}
    assert {step for step in before if after[step] == before[step]} == {"checkpoint", "engine"}
    # What was not done before depends on the repository as those do: of one input, it has one key.
    assert len({after[step]["key"] for step in ("repository", "serve", "audit", "tokens", "behaviour")}) == 1
    document = json.loads((on_cpu.output / "acceptance.json").read_text())
    assert "queue of 32" in lines_of(document, "PASS")["behaviour.queue_full"]


def test_what_is_finished_is_not_done_again(on_cpu: OnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_RECIPE_SERVING_MAX_QUEUE_SIZE", "32")
    before, log = steps_of(on_cpu.output), (on_cpu.output / "evidence" / "behaviour.log").stat().st_mtime_ns
    assert accepted(on_cpu.output, "--recipe", "cpu")["verdict"] == "PASS"
    assert steps_of(on_cpu.output) == before
    assert (on_cpu.output / "evidence" / "behaviour.log").stat().st_mtime_ns == log


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
        return accepted(self.output, "--recipe", "a100-int8", "--baseline", self.folder / "baseline.json",
                        "--small", SMALL_MODEL)  # fmt: skip

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
    plan = json.loads(called("plan", "--recipe", "a100-int8", "--model", SMALL_MODEL, "--json").stdout)
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
        patch.setenv("MINITRON_RECIPE_SERVING_MAX_QUEUE_SIZE", "40")  # more than a burst of 32
        machine = A100(folder)
        machine.runtime = plan_of_the_recipe()
        sixteen_bit_run(folder / "baseline.json")
        cpu = ("--recipe", "a100-int8", "--target", "cpu")
        for words in (
            ("convert", SMALL_MODEL, "--recipe", "a100-int8", "--output", folder / "checkpoint"),
            ("build", folder / "checkpoint", *cpu, "--output", folder / "engine"),
            ("render", folder / "engine", "--recipe", "a100-int8", "--output", folder / "repository"),
        ):
            done = called(*words)
            assert done.returncode == 0, done.stderr
        machine.accept()
        yield machine


def test_on_an_a100_of_doubles_every_line_passes(a100: A100) -> None:
    document = json.loads((a100.output / "acceptance.json").read_text())
    assert lines_of(document, "FAIL") == {}
    # The CPU engine in the slot gives no logits, no tasks were given, and nothing plays the LLM API behind Triton.
    assert set(lines_of(document, "SKIPPED")) == {"behaviour.logits", "tasks.gate", "llmapi.answers"}
    evidence = lines_of(document, "PASS")
    assert evidence["small.answers"].endswith("every log prob finite")
    assert "weights by the plan" in evidence["build.done"]
    assert evidence["words.same"].startswith("20 of 20 prompts equal")
    assert "answered (utils.cc" in evidence["behaviour.bad_words"]
    runs = [call for call in a100.calls() if call[0] == "run"]
    assert all("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in call for call in runs)
    assert sum("trtllm-build" in call for call in runs) == 2  # the small Minitron first, then the model


@pytest.mark.slow
def test_every_number_is_in_the_document_and_two_documents_compare(a100: A100, tmp_path: Path) -> None:
    document = json.loads((a100.output / "acceptance.json").read_text())
    numbers = document["numbers"]
    assert numbers["runtime.kv_cache_tokens"] == a100.runtime["kv_tokens"]
    assert numbers["runtime.engine_bytes"] == a100.runtime["engine_mib"] << 20
    wanted = {"build.seconds", "plan.weight_bytes", "step.build_s", f"speed.{PREFILL}.ttft_ms_p50",
              "bursts.16:8:4.tokens_per_s", "bursts.16:8:32.ttft_ms_p50"}  # fmt: skip
    assert wanted - set(numbers) <= {"step.build_s"}  # a stage that make brings up to date has no time of its own
    other = document | {"numbers": numbers | {"runtime.kv_cache_tokens": 1}, "lines": document["lines"][1:]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    words = ("accept", "--recipe", "a100-int8", "--model", SMALL_MODEL, "--output", a100.output, "--compare")
    compared = json.loads(called(*words, tmp_path / "other.json", "--json").stdout)
    (differing,) = [one for one in compared["numbers"] if one["ratio"] != 1 and one["ours"]]
    assert differing["name"] == "runtime.kv_cache_tokens" and differing["theirs"] == 1
    assert [line["id"] for line in compared["lines"]] == ["tool.command"]
    assert called(*words, a100.folder / "baseline.json").returncode == 3


Disagree = Callable[[A100, pytest.MonkeyPatch], None]


def _set(name: str, value: str) -> Disagree:
    return lambda a100, patch: patch.setenv(name, value)


def _another_runtime(a100: A100, patch: pytest.MonkeyPatch) -> None:
    """Half the KV cache, more workspace, an engine larger than its weights, a parameter and a limit read otherwise."""
    said = {"kv_tokens": a100.runtime["kv_tokens"] // 2, "context_mib": 8000.0, "engine_mib": 900,
            "limits": {"maxNumTokens": 16},
            "warnings": ["enable_chunked_context is not specified, will be set to false."]}  # fmt: skip
    patch.setattr(a100, "runtime", a100.runtime | said)


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


#: What disagrees, which steps are done again, and what the lines say that fail. Of the runtime's log all is off at
#: once, for a server's start costs seconds; that each of it fails its own line alone, test_model_repo_audit.py holds.
DISAGREEMENTS: dict[str, tuple[Disagree, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "a missing flag": (
        _set("TRTLLM_BUILD_DOUBLE_HELP", "without:reduce_fusion"), ("tool",), {
            "tool.flags": ("--reduce_fusion is not",)}),
    "a refused flag": (
        _set("TRTLLM_BUILD_DOUBLE_HELP", "choices:kv_cache_type=continuous"), ("tool",), {
            "tool.command": ("ends with 2", "invalid choice: 'paged'")}),
    "a changed default": (
        _set("TRTLLM_BUILD_DOUBLE_HELP", "default:max_num_tokens=4096"), ("tool",), {
            "tool.defaults": ("--max_num_tokens has default 4096, and 8192 was expected",)}),
    "another TensorRT-LLM": (
        _set("TRTLLM_BUILD_DOUBLE_VERSION", "1.3.0"), ("tool",), {"tool.versions": ("tensorrt_llm is 1.3.0",)}),
    "a refused checkpoint": (
        _set("IMAGE_DOUBLE", "load"), ("checkpoint",), {"checkpoint.loads": ("Required but not provided",)}),
    "a config key dropped": (
        _set("IMAGE_DOUBLE", "config:rotary_pct"), ("checkpoint",), {
            "checkpoint.config": ("rotary_pct is not read back",)}),
    "a code off by one": (
        _set("IMAGE_DOUBLE", "code"), ("checkpoint",), {
            "checkpoint.codes": ("layers.0.attention.qkv.weight differs in 1 of",)}),
    "a different scale": (
        _set("IMAGE_DOUBLE", "scale"), ("checkpoint",), {"checkpoint.scales": ("qkv.per_channel_scale differs in",)}),
    "a runtime that says otherwise": (
        _another_runtime, ("audit",), {
            "audit.kv_tokens": ("more than 10% below",),
            "audit.workspace": ("execution context 8.39 GB",),
            "audit.weights": ("engine 943.7 MB",),
            "audit.parameters": (
                "enable_chunked_context was rendered as 'true'", "max_num_tokens is 16 in the runtime"),
        }),
    "a token changed": (_a_token, ("tokens", "words"), {"words.same": ("no near tie",)}),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_double_that_disagrees_fails_exactly_its_lines(
    a100: A100, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disagree, again, wanted = DISAGREEMENTS[name]
    disagree(a100, monkeypatch)
    with a100.evidence_kept():
        failed = lines_of(a100.accept(*again), "FAIL")
    assert set(failed) == set(wanted)
    page = (a100.output / "acceptance.html").read_text()
    for line, said in wanted.items():
        assert [text for text in said if text not in failed[line]] == []
        assert catalogue()[line].remedy.split(":")[0].replace("'", "&#39;") in page


def test_a_stored_reference_counts_for_its_own_checkpoint_alone(a100: A100, on_cpu: OnCpu, tmp_path: Path) -> None:
    """The recipes cpu and a100-int8 make the same checkpoint of the small Minitron, which is in bfloat16."""
    words = ("--recipe", "a100-int8", "--baseline", a100.folder / "baseline.json", "--reference")
    evidence = lines_of(accepted(a100.output, *words, on_cpu.output), "PASS")
    assert str(on_cpu.output) in evidence["words.reference"]
    assert evidence["words.same"].startswith("20 of 20 prompts equal")
    tokens = json.loads((on_cpu.output / "evidence" / "greedy-tokens.json").read_text())
    (tmp_path / "greedy-tokens.json").write_text(json.dumps(tokens | {"checkpoint": "0" * 64}))
    document = accepted(a100.output, *words, tmp_path)
    assert "is of checkpoint 0000000000000000" in lines_of(document, "FAIL")["words.reference"]
    assert lines_of(document, "SKIPPED")["words.same"] == "step reference failed"


def test_without_docker_what_needs_it_is_skipped_and_never_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither docker nor nvidia-smi
    document = accepted(tmp_path / "out", "--recipe", "a100-int8")
    assert set(lines_of(document, "FAIL")) == {"tool.command"}  # the cheapest proof, and the hour ends there
    assert lines_of(document, "PASS") == {}
    assert lines_of(document, "SKIPPED")["convert.done"] == "step tool failed"
    document = accepted(tmp_path / "out", "--recipe", "a100-int8", "--keep-going")
    assert set(lines_of(document, "FAIL")) == {"tool.command", "machine.ready"}
    assert set(lines_of(document, "PASS")) == {"convert.done", "checkpoint.whole"}


def test_a_dry_run_prints_the_hour_with_time_and_money(tmp_path: Path) -> None:
    """Steps in the order in which they run, each with what is spent until then."""
    done = called("accept", "--recipe", "a100-int8", "--dry-run", "--price", "3", "--output", tmp_path / "out")
    steps = [line.split()[0] for line in done.stdout.split("\n\n")[0].splitlines()[2:]]
    judged = list(dict.fromkeys(entry.step for entry in catalogue().values()))
    assert steps == judged
    most = sum(step.most for step in hour.steps())
    assert f"{most / 60 * 3:.2f} USD at 3.00 USD an hour" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_server_that_runs_is_held_alone(on_cpu: OnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check that its repository can be asked, and no server is started, stopped or accepted for it."""
    monkeypatch.setattr(speed, "bursts", lambda grid: ("16:8:2",))
    repository, words = on_cpu.output / "repository", ("--output", tmp_path / "out", "--json")
    with serving(repository, "--state", str(tmp_path / "state")):
        done = called("accept", repository, "--state", tmp_path / "state", "--grid", *GRID, *words)
        document = json.loads(done.stdout)
        assert (done.returncode, document["verdict"], document["finished"]) == (0, "PASS", False)
        wanted = {name for name, entry in catalogue().items()
                  if entry.step in ("engine", "audit", "tokens", "bursts", "speed", "behaviour", "tasks")}  # fmt: skip
        assert {line["id"] for line in document["lines"]} == wanted
        assert document["numbers"]["runtime.kv_cache_tokens"] and "speed.16:8:1.tokens_per_s" in document["numbers"]
        assert not (tmp_path / "out" / "acceptance.json").exists()  # a part is no acceptance
        stored = tmp_path / "out" / "evidence" / "greedy-tokens.json"
        done = called("accept", stored, "--reference", on_cpu.output, *words)
        assert lines_of(json.loads(done.stdout), "PASS")["words.same"].startswith("20 of 20 prompts equal")
    done = called("accept", repository, "--state", tmp_path / "state", "--only", "server", *words)
    assert done.returncode == 10 and "is ready here" in done.stderr


def test_llmapi_has_nothing_to_accept() -> None:
    done = called("accept", "--recipe", "a100-llmapi")
    assert done.returncode == 2 and "llmapi" in done.stderr
