"""The parts of an acceptance that need no server: lines, what is remembered, speed, the page."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron import checks, recipe
from minitron.checks import FAIL, PASS, SKIPPED, Check, catalogue, judge
from minitron.errors import InputError
from minitron_build.probe.engine import judge_engine
from minitron_cli.accept import engines_beside, page, speed, walk
from minitron_cli.accept.acceptance import Acceptance, Options
from minitron_cli.accept.evidence import Evidence
from minitron_cli.accept.walk import Step, Walk


def test_every_line_says_what_it_holds_and_what_to_do() -> None:
    for entry in catalogue().values():
        assert entry.question and entry.remedy and entry.step
        assert entry.name.isascii() and "\n" not in entry.question + entry.remedy


def test_a_judgement_names_what_is_wrong_and_counts_the_rest() -> None:
    assert judge("tool.flags", [], "70 flags") == Check("tool.flags", PASS, "70 flags")
    many = judge("tool.flags", [f"--flag{number} is not there" for number in range(20)], "")
    assert many.verdict == FAIL
    assert many.evidence.startswith("--flag0 is not there; ") and many.evidence.endswith("and 12 more")


def test_stored_checks_are_read_back(tmp_path: Path) -> None:
    """That the exit code is the verdict, test_clients_words.py and test_accept.py hold."""
    judged = [Check("tool.flags", PASS, "70 flags"), Check("tool.versions", SKIPPED, "no image")]
    assert Evidence(tmp_path).keep("a", judged, subject="tool") == judged
    assert checks.read(tmp_path / "a.json") == (judged, json.loads((tmp_path / "a.json").read_text()))
    assert checks.read(tmp_path / "a.json")[1]["subject"] == "tool"
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read as evidence"):
        checks.read(tmp_path / "b.json")


def test_a_step_is_remembered_by_its_inputs_unless_it_failed(tmp_path: Path) -> None:
    done: list[str] = []

    def work(status: str) -> Any:
        def judged() -> list[Check]:
            done.append(status)
            return [Check("engine.config", status, "seen")]

        return judged

    assert Evidence(tmp_path, fresh=False).do("engine", "a", work(PASS))[0].verdict == PASS
    again = Evidence(tmp_path, fresh=False)
    assert again.do("engine", "a", work(FAIL))[0].verdict == PASS  # not done again
    assert again.do("engine", "b", work(FAIL))[0].verdict == FAIL  # other inputs
    assert again.do("engine", "b", work(PASS))[0].verdict == PASS  # a failed one is tried again
    assert again.do("engine", "b", work(PASS), made=tmp_path / "missing")  # what it made is gone
    assert Evidence(tmp_path, fresh=True).do("engine", "b", work(PASS))
    assert Evidence(tmp_path, anew=["engine"]).do("engine", "b", work(PASS))  # asked for by name
    assert done == [PASS, FAIL, PASS, PASS, PASS, PASS]


def walked(folder: Path, work: Callable[[], Any], only: dict[str, frozenset[str]] | None = None) -> list[Check]:
    """The checks of the one step ``engine``, which does ``work``."""
    steps = [Step("engine", (), work)]
    walk = Walk(Evidence(folder), on_gpu=False, only=only or {})
    return [check for _, found in walk.through(steps, walk.wanted(steps)) for check in found]


def test_a_step_leaves_its_log_and_its_last_words(tmp_path: Path, capfd: Any) -> None:
    def work() -> Any:
        print("asked")
        logging.getLogger("minitron").warning("seen")
        return judge_engine(tmp_path / "nowhere")

    (failed,) = walked(tmp_path, work)
    assert failed.verdict == FAIL and failed.evidence.startswith(f"{tmp_path / 'nowhere'} has no manifest.json")
    assert (tmp_path / "engine.log").read_text() == f"asked\nseen\nerror: {failed.evidence}\n"
    assert "asked" not in capfd.readouterr().out
    with pytest.raises(InputError, match=r"has no manifest\.json"):  # whoever asks for this alone gets it as it is
        walked(tmp_path, work, {"engine": frozenset({"engine.config"})})


def test_a_bug_of_ours_fails_its_step_and_leaves_its_place(tmp_path: Path) -> None:
    (failed,) = walked(tmp_path, lambda: 1 // 0)
    assert failed.verdict == FAIL and "please report it (ZeroDivisionError" in failed.evidence
    assert "Traceback" in (tmp_path / "engine.log").read_text()
    assert not (tmp_path / "quiet").exists() and walked(tmp_path / "quiet", list)[0].verdict == SKIPPED
    assert not (tmp_path / "quiet" / "engine.log").exists()  # a step that says nothing leaves no log


def test_what_is_asked_for_is_a_step_or_a_check() -> None:
    assert walk.chosen([]) == {}
    assert walk.chosen(["server"]) == walk.chosen(["audit"])
    assert walk.chosen(["behaviour.stop_words", "behaviour.text"]) == {
        "behaviour": {"behaviour.stop_words", "behaviour.text"}
    }
    assert set(walk.chosen(["tool", "engine"])) == {"tool", "engine"}


def test_a_part_brings_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    done: list[str] = []

    def step(name: str, *needs: str) -> Step:
        return Step(name, needs, lambda: done.append(name) or [Check(f"{name}.done", PASS, "seen")])  # type: ignore[func-returns-value]

    steps = [step("machine"), step("convert"), step("build", "convert")]
    only = {"build": frozenset({"build.done"})}
    through = Walk(Evidence(tmp_path), on_gpu=False, only=only)
    found = list(through.through(steps, through.wanted(steps)))
    assert found == [("build", [Check("build.done", PASS, "seen")])]
    assert done == ["convert", "build"]
    assert set(Walk(Evidence(tmp_path), on_gpu=False, only=only, alone=True).wanted(steps)) == {"build"}


PREFILL = "1024:2:1"


def measured(rates: dict[str, float], roofline: float | None = 100.0, ttft: float = 9.0) -> dict[str, Any]:
    """A run with those tokens/s, and at a prompt of 1,024 tokens a first token after ``ttft`` ms."""
    points = []
    for name, rate in {**rates, PREFILL: 1.0}.items():
        sizes = dict(zip(("input_tokens", "output_tokens", "concurrency"), map(int, name.split(":")), strict=True))
        points.append(
            {"point": sizes, "tokens_per_s": {"value": rate}, "metrics": {"ttft_ms": {"p50": {"value": ttft}}}}
        )
    return {"kind": "latency", "points": points,
            "roofline": roofline and {"precision": "int8_weight_only", "single_tokens_per_s": roofline}}  # fmt: skip


def verdicts(ours: dict[str, Any], baseline: dict[str, Any] | None, *, on_gpu: bool = True) -> list[str]:
    judged = [*speed.judge_speed(ours), speed.judge_beside(ours, baseline, on_gpu=on_gpu)]
    return [line.verdict for line in judged]


def test_speed_is_held_against_physics_and_against_sixteen_bits() -> None:
    ours = measured({"8:8:1": 90.0, "8:8:4": 350.0})
    assert verdicts(ours, measured({"8:8:1": 60.0, "8:8:4": 400.0})) == [PASS, PASS, PASS]  # only one stream counts
    assert verdicts(ours, measured({"8:8:1": 99.0})) == [PASS, PASS, FAIL]  # 0.91 of 16 bits
    # Prompts are known to lose with weight-only kernels; one and a half times is the bound.
    assert verdicts(ours, measured({"8:8:1": 60.0}, ttft=6.1)) == [PASS, PASS, PASS]
    assert verdicts(ours, measured({"8:8:1": 60.0}, ttft=5.9)) == [PASS, PASS, FAIL]
    without = measured({"8:8:1": 60.0})
    without["points"].pop()
    assert verdicts(ours, without) == [PASS, PASS, SKIPPED]
    assert verdicts(measured({"8:8:4": 401.0}), None) == [PASS, FAIL, SKIPPED]  # 4 streams at 100 each are the bound
    assert verdicts(measured({"8:8:1": 90.0}, None), measured({"8:8:1": 900.0}), on_gpu=False) == [
        PASS,
        SKIPPED,
        SKIPPED,
    ]
    assert "TTFT 9.0 ms" in speed.shown(ours)


def test_three_points_and_the_sixteen_bit_recipe_follow_from_the_recipe() -> None:
    wanted = recipe.load("a100-int8", {}).recipe
    assert speed.grid(wanted) == ("512:256:1", "512:256:8", "512:256:32")
    assert speed.prefill_point(wanted) == PREFILL
    sixteen = speed.sixteen_bit(wanted)
    assert (sixteen.precision, sixteen.dtype, sixteen.target) == ("bfloat16", "auto", "a100-80gb")
    assert not sixteen.is_weight_only
    assert speed.grid(recipe.load(None, {}, {"workload.concurrency": 1}).recipe) == (
        "128:128:1",
        "128:128:2",
        "128:128:3",
    )


ABOUT = {
    "recipe": "<a100>",
    "target": "a100-80gb",
    "model": "m",
    "precision": "auto",
    "created": "now",
    "finished": True,
}
SOME = [Check("words.same", PASS, "20 of 20"), Check("tool.flags", FAIL, "--x is <not> there"),
        Check("audit.weights", SKIPPED, "the log does not say")]  # fmt: skip


def test_the_document_has_the_catalogues_order_and_remedies_for_failures_only() -> None:
    whole = page.document(SOME, ABOUT, {"tool": 3.0}, {})
    assert [line["id"] for line in whole["lines"]] == ["tool.flags", "audit.weights", "words.same"]
    assert [bool(line["remedy"]) for line in whole["lines"]] == [True, False, False]
    assert (whole["verdict"], whole["counts"]) == ("FAIL", {"PASS": 1, "FAIL": 1, "SKIPPED": 1})
    assert "what to do: " + catalogue()["tool.flags"].remedy in page.text(whole)


def written(folder: Path) -> str:
    (folder / "evidence").mkdir()
    (folder / "evidence" / "tool.log").write_text("said")
    page.write(folder, page.document(SOME, ABOUT, {step.step: 3.0 for step in catalogue().values()}, {}))
    return (folder / "acceptance.html").read_text()


def test_the_page_escapes_what_others_said_and_links_its_evidence(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "--x is &lt;not&gt; there" in text and "<not>" not in text
    assert 'href="evidence/tool.log"' in text
    assert text.count("What to do:") == 1


@pytest.mark.browser
def test_the_page_in_a_real_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "this test needs Chromium (Debian: apt install chromium)"
    written(tmp_path)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--dump-dom"]  # fmt: skip
    shown = subprocess.run([browser, *options, (tmp_path / "acceptance.html").as_uri()], capture_output=True, text=True,
                           check=True, timeout=120)  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count("<tr>") == 3 and shown.stdout.count("<h2>") == 3


class Server:
    """Stands for a server of our own."""

    def __init__(self, *words: Any) -> None:
        self.words = words

    def answer(self, text: str) -> str:
        asked.append("generate")
        return text

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        asked.append("stop")


asked: list[str] = []


def test_the_llm_api_is_served_and_asked_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe.load("a100-int8", {}).recipe
    for number, (text, verdict) in enumerate((("And the earth", PASS), (" ", FAIL))):
        asked.clear()
        folder = tmp_path / str(number)
        monkeypatch.setattr(Acceptance, "make", lambda _, until, folder, effective: asked.append(
            f"{until} {folder.name} {effective.recipe.backend} {effective.recipe.precision}"))  # fmt: skip
        monkeypatch.setattr(engines_beside, "Started", Server)
        monkeypatch.setattr(engines_beside, "answer", lambda serving, text=text: serving.answer(text))
        work = Acceptance(wanted, folder, Evidence(folder / "evidence"), Options(llmapi=True))
        (check,) = engines_beside.llmapi(work)
        assert (check.name, check.verdict) == ("llmapi.answers", verdict)
        assert asked == ["render llmapi llmapi bfloat16", "generate", "stop"]  # it takes 16 bits only
        rendered = json.loads((folder / "llmapi" / "recipe.yaml").read_text())
        assert (rendered["backend"], rendered["precision"]) == ("llmapi", "bfloat16")
    without = Acceptance(wanted, tmp_path, Evidence(tmp_path), Options())
    assert engines_beside.llmapi(without)[0].verdict == SKIPPED
