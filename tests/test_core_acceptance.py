"""The parts of an acceptance that need no server: lines, what is remembered, speed, the page."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron import acceptance, recipe
from minitron.acceptance import FAIL, PASS, SKIPPED, Line, catalogue, judge
from minitron.errors import InputError
from minitron_cli.accept import engines_beside, page, speed
from minitron_cli.accept.evidence import Evidence, StepFailed
from minitron_cli.accept.work import Options, Work


def test_every_line_says_what_it_holds_and_what_to_do() -> None:
    for entry in catalogue().values():
        assert entry.what and entry.remedy and entry.step
        assert entry.id.isascii() and "\n" not in entry.what + entry.remedy


def test_a_judgement_names_what_is_wrong_and_counts_the_rest() -> None:
    assert judge("tool.flags", [], "70 flags") == Line("tool.flags", PASS, "70 flags")
    many = judge("tool.flags", [f"--flag{number} is not there" for number in range(20)], "")
    assert many.status == FAIL
    assert many.evidence.startswith("--flag0 is not there; ") and many.evidence.endswith("and 12 more")


def test_stored_lines_are_read_back_and_the_exit_code_is_the_verdict(tmp_path: Path, capsys: Any) -> None:
    judged = [Line("tool.flags", PASS, "70 flags"), Line("tool.versions", SKIPPED, "no image")]
    assert acceptance.report(judged, to=tmp_path / "a.json", as_json=True, subject="tool") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a.json").read_text())
    assert acceptance.read(tmp_path / "a.json")[0] == judged
    assert acceptance.report([Line("tool.flags", FAIL, "no")], to=None, as_json=False) == 8
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read as evidence"):
        acceptance.read(tmp_path / "b.json")


def test_a_step_is_remembered_by_its_inputs_unless_it_failed(tmp_path: Path) -> None:
    done: list[str] = []

    def work(status: str) -> Any:
        def judged() -> list[Line]:
            done.append(status)
            return [Line("engine.config", status, "seen")]

        return judged

    assert Evidence(tmp_path, fresh=False).do("engine", "a", work(PASS))[0].status == PASS
    again = Evidence(tmp_path, fresh=False)
    assert again.do("engine", "a", work(FAIL))[0].status == PASS  # not done again
    assert again.do("engine", "b", work(FAIL))[0].status == FAIL  # other inputs
    assert again.do("engine", "b", work(PASS))[0].status == PASS  # a failed one is tried again
    assert again.do("engine", "b", work(PASS), made=tmp_path / "missing")  # what it made is gone
    assert Evidence(tmp_path, fresh=True).do("engine", "b", work(PASS))
    assert done == [PASS, FAIL, PASS, PASS, PASS]


def test_a_command_of_a_step_leaves_its_log_and_its_last_words(tmp_path: Path) -> None:
    evidence = Evidence(tmp_path, fresh=False)
    with pytest.raises(StepFailed) as failure:
        evidence.run("engine", "probe", "engine", tmp_path / "nowhere")
    assert failure.value.code == 3
    assert failure.value.said.startswith(f"{tmp_path / 'nowhere'} has no manifest.json")
    log = (tmp_path / "engine.log").read_text()
    assert log.startswith(f"$ minitron probe engine {tmp_path / 'nowhere'}\n") and "error: " in log


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
    return [line.status for line in judged]


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
    assert not speed.is_weight_only(sixteen)
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
SOME = [Line("words.same", PASS, "20 of 20"), Line("tool.flags", FAIL, "--x is <not> there"),
        Line("audit.weights", SKIPPED, "the log does not say")]  # fmt: skip


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


class Asked:
    """Evidence that only notes which commands were run; 'generate' is answered with ``text``."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self.words: list[str] = []

    def run(self, step: str, *words: str | Path, **how: bool) -> str:
        self.words.append(" ".join(map(str, words[:2])))
        return self.text if words[0] == "generate" else json.dumps({"urls": {"grpc": "127.0.0.1:1"}, "log": "-"})

    def do(self, step: str, inputs: Any, work: Callable[[], list[Line]], made: Path | None = None) -> list[Line]:
        return work()


def test_the_llm_api_is_served_and_asked_where_it_is_wanted(tmp_path: Path) -> None:
    wanted = recipe.load("a100-int8", {}).recipe
    for text, status in (("And the earth", PASS), (" ", FAIL)):
        asked = Asked(tmp_path, text)
        work = Work(wanted, tmp_path, asked, Options(llmapi=True))  # type: ignore[arg-type]
        (line,) = engines_beside.llmapi(work)
        assert (line.id, line.status) == ("llmapi.answers", status)
        place = str(tmp_path / "llmapi" / "repository")
        assert asked.words == ["render", f"serve {place}", "generate In the beginning", f"stop {place}"]
        rendered = json.loads((tmp_path / "llmapi" / "recipe.yaml").read_text())
        assert (rendered["backend"], rendered["precision"]) == ("llmapi", "bfloat16")  # it takes 16 bits only
    assert engines_beside.llmapi(Work(wanted, tmp_path, asked, Options()))[0].status == SKIPPED  # type: ignore[arg-type]
