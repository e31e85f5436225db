"""``minitron eval --tasks``: lm-eval's tasks on what the toolkit makes. The judge is lm-eval's own command with its
model "hf", in float32, on the small Minitron with the rounding that its bfloat16 checkpoint has; of the gate, that a
model is known to be as good (itself, int8) or worse (a layer's scales spoiled).

Needs torch and lm-eval: the environment of ``make test-reference``.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA, ROOT, SMALL_MODEL, minitron_here
from minitron.errors import InputError, MissingDependency, NotReady, Undecided, UsageError, VerdictError
from minitron.model import shape
from minitron.model.precision import Precision
from nemotron_reference import rounded_weights, source_weights

pytestmark = pytest.mark.reference

TASKS = ("verse_endings", "verse_writing", "verse_reading")
WORDS = ("--tasks", ",".join(TASKS), "--include", ROOT / "examples" / "lm_eval")


@pytest.fixture(scope="module", autouse=True)
def in_the_repository() -> Any:
    """The examples' questions lie where their tasks say, from there on."""
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Minitron in float32, each weight as its bfloat16 checkpoint has it."""
    from make_fixtures import transformers_model

    folder = tmp_path_factory.mktemp("rounded")
    weights = rounded_weights(source_weights(SMALL_MODEL), Precision.BFLOAT16, "bfloat16")
    transformers_model(shape.read(SMALL_MODEL / "config.json"), weights).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(SMALL_MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def judged(rounded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval's command says: its figures of each task, and of each question what the model answered."""
    output = tmp_path_factory.mktemp("lm-eval")
    subprocess.run(
        [Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--model_args",
         f"pretrained={rounded},dtype=float32", "--device", "cpu", "--include_path", "examples/lm_eval", "--tasks",
         ",".join(TASKS), "--output_path", output, "--log_samples"],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (results,) = output.rglob("results_*.json")
    answers = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        answers[task] = {line["doc_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    return {"results": json.loads(results.read_text())["results"], "answers": answers}


def evaluated(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """The document of a run."""
    found, out, err = minitron_here("eval", *words, "--json")
    assert found == code, err
    document: dict[str, Any] = json.loads(out)
    return document


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in found.items() if "," in key and isinstance(value, float)}


def test_a_folder_run_by_transformers_has_lm_eval_s_figures_to_the_last_digit(
    rounded: Path, judged: dict[str, Any]
) -> None:
    tasks = evaluated(rounded, "--transformers", *WORDS)["subjects"][0]["tasks"]
    for task in TASKS:
        assert figures(tasks[task]["figures"][task]) == figures(judged["results"][task])
        assert figures(judged["results"][task])
    assert tasks["verse_endings"]["value"] == judged["results"]["verse_endings"]["acc_norm,none"]
    assert len(tasks["verse_endings"]["questions"]) == 12


def test_a_cpu_engine_answers_as_transformers_does(small_engine: Callable[[str], Path], judged: dict[str, Any]) -> None:
    """Log probs within 1e-3, the same texts, and the same figures of both."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from minitron_build.evaluate.tasks.engine_model import EngineModel

    manager = TaskManager(include_path="examples/lm_eval")
    found = simple_evaluate(EngineModel(small_engine("bfloat16"), 2048), tasks=list(TASKS), task_manager=manager,
                            bootstrap_iters=0)  # fmt: skip
    compared = 0
    for task in TASKS:
        for sample in found["samples"][task]:
            expected = judged["answers"][task][sample["doc_id"]]["resps"]
            for (own,), (theirs,) in zip(sample["resps"], expected, strict=True):
                compared += 1
                if task == "verse_writing":
                    assert own == theirs
                elif task == "verse_reading":
                    assert own == pytest.approx(float(theirs), abs=1e-3)
                else:
                    assert own[0] == pytest.approx(float(theirs[0]), abs=1e-3)
                    assert own[1] == (theirs[1] == "True")
    assert compared == 12 * 4 + 12 + 12
    assert found["results"]["verse_endings"]["acc,none"] == judged["results"]["verse_endings"]["acc,none"]
    own, theirs = (one["verse_reading"]["word_perplexity,none"] for one in (found["results"], judged["results"]))
    assert own == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in ARC's columns: in which order do the words of a sentence go on, that was not trained on?"""
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    sentences = [one.split() for one in re.split(r"(?<=[.;:?])\s+", " ".join(chapters)) if len(one.split()) >= 6]
    pick = random.Random(4)
    lines: list[dict[str, Any]] = []
    for words in sentences:
        rest = words[len(words) // 2 :]
        endings = [" ".join(rest), *(" ".join(pick.sample(rest, len(rest))) for _ in range(3))]
        right = pick.randrange(4)
        endings[0], endings[right] = endings[right], endings[0]
        choices = {"text": endings, "label": ["A", "B", "C", "D"]}
        lines.append({"id": str(len(lines)), "question": " ".join(words[: len(words) // 2]), "choices": choices,
                      "answerKey": "ABCD"[right]})  # fmt: skip
    folder = tmp_path_factory.mktemp("data")
    place = folder / "allenai" / "ai2_arc" / "ARC-Challenge"
    place.mkdir(parents=True)
    for name, some in (("test", lines[5:]), ("train", lines[:5])):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def baseline(small_engine: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored run of the bfloat16 engine."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    evaluated(small_engine("bfloat16"), "--tasks", "arc_challenge", "--shots", "2", "--data", data, "--output", path)
    return path


def gated(subject: Path, data: Path, baseline: Path, *words: str | Path) -> tuple[int, dict[str, Any], str]:
    code, out, err = minitron_here("eval", subject, "--tasks", "arc_challenge", "--shots", "2", "--data", data,
                                   "--baseline", baseline, *words, "--json")  # fmt: skip
    return code, json.loads(out), err


def test_int8_passes_the_gate_and_a_spoiled_layer_fails_it(
    small_checkpoint: Callable[[str], Path], data: Path, baseline: Path, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    int8 = small_checkpoint("int8_weight_only")
    page = tmp_path / "page.html"
    code, document, _ = gated(int8, data, baseline, "--tolerance", "0.05", "--html", page)
    (verdict,) = document["verdicts"][str(int8)]
    assert code == 0 and verdict["outcome"] == "pass" and verdict["count"] > 150
    assert document["outcomes"] == {str(int8): "pass"}
    assert verdict["method"].startswith("paired") and page.read_text().count("<svg") == 2
    broken = tmp_path / "broken"
    shutil.copytree(int8, broken, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(broken / "rank0.safetensors")
    pick = np.random.default_rng(2)
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
        name = f"transformer.layers.1.{module}.per_channel_scale"
        tensors[name] = (tensors[name] * pick.uniform(-3, 3, tensors[name].shape)).astype(tensors[name].dtype)
    save_file(tensors, broken / "rank0.safetensors")
    code, document, err = gated(broken, data, baseline, "--tolerance", "0.05")
    (verdict,) = document["verdicts"][str(broken)]
    assert code == VerdictError.exit_code and verdict["outcome"] == "fail"
    assert "worse than the baseline by more than 0.05" in err


def test_an_acceptance_holds_the_gate_of_a_server(
    server: dict[str, Any], small_repository: Callable[[str], Path], data: Path, baseline: Path, tmp_path: Path
) -> None:
    """Its engine is as good as itself, and not as good as one that knows every answer."""
    perfect = json.loads(baseline.read_text(encoding="utf-8"))
    task = perfect["subjects"][0]["tasks"]["arc_challenge"]
    task |= {"value": 1.0, "questions": dict.fromkeys(task["questions"], 1.0)}
    (tmp_path / "perfect.json").write_text(json.dumps(perfect), encoding="utf-8")
    for run, tolerance, verdict in ((baseline, 0.2, "PASS"), (tmp_path / "perfect.json", 0.001, "FAIL")):
        words = f"--tasks arc_challenge --shots 2 --data '{data}' --tolerance {tolerance} --baseline '{run}'"
        code, out, err = minitron_here(
            "accept", small_repository("bfloat16"), "--only", "tasks", "--url", server["urls"]["grpc"], "--eval", words,
            "--output", tmp_path / "out", "--json",
        )  # fmt: skip
        (line,) = json.loads(out)["lines"]
        assert (line["id"], line["status"], code) == ("tasks.gate", verdict, 8 if verdict == "FAIL" else 0), (line, err)
    assert "worse than the baseline by more than 0.001" in line["evidence"]
    assert not list((tmp_path / "out").rglob("eval-answers*"))  # or another engine at that address would have them
    for words, why in (
        ("--tasks x --baseline y", "no --tolerance"),
        ("--url grpc://x", "--url is said by"),
        ("--tasks 'x", "No closing quotation"),
        ("--baseline x --tolerance 1 --nonsense", "--nonsense"),
    ):
        code, _, err = minitron_here("accept", small_repository("bfloat16"), "--only", "tasks", "--eval", words)
        assert code == UsageError.exit_code and why in err


def test_too_few_questions_say_so_and_how_many_would_do(
    small_checkpoint: Callable[[str], Path], data: Path, baseline: Path
) -> None:
    code, document, err = gated(small_checkpoint("int8_weight_only"), data, baseline, "--tolerance", "0.02",
                                "--limit", "10")  # fmt: skip
    ((verdict,),) = document["verdicts"].values()
    assert code == Undecided.exit_code and verdict["outcome"] == "undecided"
    assert verdict["count"] == 10 and verdict["needed"] > 10
    assert "too few questions to decide" in err and str(verdict["needed"]) in err


def test_a_killed_run_goes_on_where_it_was(
    small_engine: Callable[[str], Path], data: Path, baseline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file of a whole run, cut in the middle of a line, as a kill leaves it: the same document, fewer requests."""
    words = (small_engine("bfloat16"), "--tasks", "arc_challenge", "--shots", "2", "--data", data, "--resume",
             tmp_path / "notes")  # fmt: skip
    whole = evaluated(*words)
    notes = (tmp_path / "notes").read_bytes()
    (tmp_path / "notes").write_bytes(notes[: len(notes) // 2])
    code, out, _ = minitron_here("eval", *words, "--json")
    assert code == 0 and json.loads(out) == whole
    again = (tmp_path / "notes").read_bytes()
    assert sorted(requests(again)) == sorted(requests(notes))  # each asked once
    kept = notes[: len(notes) // 2].count(b"\n")
    total = notes.count(b"\n")
    assert f"{kept} of {total} requests" in caplog.text
    assert whole["subjects"][0]["tasks"] == json.loads(baseline.read_text())["subjects"][0]["tasks"]
    (tmp_path / "notes").write_text("nothing\n")
    assert minitron_here("eval", *words)[0] == InputError.exit_code


def requests(notes: bytes) -> list[str]:
    return [json.loads(line)["request"] for line in notes.splitlines()]


def test_what_cannot_be_asked_is_refused_in_a_sentence(
    small_engine: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine("bfloat16")

    def refused(*words: str | Path) -> tuple[int, str]:
        code, _, err = minitron_here("eval", engine, *words)
        assert err.count("\n") == 1 or "requests" in err, err
        return code, err

    assert refused("--tasks", "gsm8k")[0] == UsageError.exit_code  # no --data
    code, err = refused("--tasks", "gsm8k", "--data", data)
    assert code == InputError.exit_code and "openai/gsm8k/main/test.jsonl" in err
    code, err = refused("--tasks", "nothing_of_the_kind", "--data", data)
    assert code == UsageError.exit_code and "no task 'nothing_of_the_kind'" in err
    assert refused("--tasks", "gsm8k", "--suite", "minitron-card")[0] == UsageError.exit_code
    assert refused("--suite", "everything")[0] == UsageError.exit_code
    assert refused("--tasks", "gsm8k", "--baseline", "card")[0] == UsageError.exit_code
    assert refused("--tasks", "gsm8k", "--text", "x")[0] == UsageError.exit_code
    tokenizer = ("--include", ROOT / "examples" / "lm_eval", "--tokenizer", SMALL_MODEL)
    for url, kind in (
        ("localhost:8001", UsageError),
        ("grpc://127.0.0.1:9", NotReady),
        ("http://127.0.0.1:9", NotReady),
    ):
        code, _, err = minitron_here("eval", "--url", url, "--tasks", "verse_writing", *tokenizer)
        assert code == kind.exit_code and url in err
    assert refused("--limit", "3")[0] == UsageError.exit_code
    place = tmp_path / "openai" / "openai_humaneval"
    place.mkdir(parents=True)
    question = {"task_id": "t/0", "prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n",
                "entry_point": "one", "canonical_solution": "    return 1\n"}  # fmt: skip
    (place / "test.jsonl").write_text(json.dumps(question))
    code, err = refused("--tasks", "minitron_humaneval", "--data", tmp_path)
    assert code == UsageError.exit_code and "--allow-code" in err
    from minitron_build.evaluate.tasks import sandbox

    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.sandbox.cache_clear()
    code, err = refused("--tasks", "minitron_humaneval", "--data", tmp_path, "--allow-code")
    assert code == MissingDependency.exit_code and "bubblewrap" in err


def card_data(folder: Path) -> None:
    """A few rows of each of the card's datasets, in its own columns (as the hub's pages of the datasets show them)."""
    from lm_eval.tasks import TaskManager

    subjects = [one.cfg["dataset_name"] for one in TaskManager().task_index.values()
                if one.yaml_path and one.yaml_path.match("mmlu/default/*") and "dataset_name" in one.cfg]  # fmt: skip
    assert len(subjects) == 57
    mmlu = {"question": "How many?", "subject": "", "choices": ["one", "two", "three", "four"], "answer": 2}
    hellaswag = {"ind": 4, "activity_label": "Rowing", "ctx_a": "A man rows.", "ctx_b": "he", "ctx": "A man rows. he",
                 "endings": ["rests.", "swims.", "sings.", "flies."], "label": "0"}  # fmt: skip
    winogrande = {"sentence": "Ann met Eve because _ called.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    arc = {"id": "1", "question": "What falls?", "choices": {"text": ["rain", "fire"], "label": ["A", "B"]},
           "answerKey": "A"}  # fmt: skip
    gsm8k = {"question": "One and one?", "answer": "It is 2.\n#### 2"}
    xlsum = {"id": "1", "url": "u", "title": "t", "summary": "It rained.", "text": "On Monday it rained."}
    humaneval = {"task_id": "t/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
                 "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}  # fmt: skip
    rows: dict[str, tuple[Any, ...]] = {
        **{f"cais/mmlu/{subject}": (mmlu | {"subject": subject}, "dev", "test") for subject in subjects},
        "Rowan/hellaswag": (hellaswag, "train", "validation"),
        "allenai/winogrande/winogrande_xl": (winogrande, "train", "validation"),
        "allenai/ai2_arc/ARC-Challenge": (arc, "train", "test"), "openai/gsm8k/main": (gsm8k, "train", "test"),
        "csebuetnlp/xlsum/english": (xlsum, "train", "test"), "openai/openai_humaneval": (humaneval, "test"),
    }  # fmt: skip
    for name, (row, *splits) in rows.items():
        said = next(key for key in ("question", "activity_label", "sentence", "text", "task_id") if key in row)
        for split in splits:
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            written = [row | {said: f"{row[said]} {number}"} for number in range(30)]
            path.write_text("\n".join(map(json.dumps, written)), encoding="utf-8")


def test_the_card_s_suite_is_asked_offline_with_the_card_s_shots(
    small_engine: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card_data(tmp_path)
    document = evaluated(small_engine("bfloat16"), "--suite", "minitron-card", "--data", tmp_path, "--limit", "1",
                         "--baseline", "card", "--tolerance", "0.7", code=Undecided.exit_code)  # fmt: skip
    tasks = document["subjects"][0]["tasks"]
    found = {name: (task["shots"], task["metric"], task["count"]) for name, task in tasks.items()}
    assert found == {"mmlu": (5, "acc", 57), "hellaswag": (10, "acc_norm", 1), "winogrande": (5, "acc", 1),
                     "arc_challenge": (25, "acc_norm", 1), "gsm8k": (5, "exact_match", 1),
                     "minitron_xlsum_en": (3, "rougeL", 1)}  # fmt: skip
    assert "minitron_humaneval is left out" in caplog.text
    assert "exact_match,strict-match" in tasks["gsm8k"]["figures"]["gsm8k"]
    assert len(tasks["mmlu"]["questions"]) == 57
