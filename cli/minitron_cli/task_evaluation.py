"""``minitron eval --tasks`` and ``--suite``: arguments, one subject after the other, what is shown, and the gate."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron import children, console, files, interrupt
from minitron.errors import NotReady, Undecided, UsageError, VerdictError

if TYPE_CHECKING:
    from minitron_build.evaluate.tasks.answers import AnswerStore
    from minitron_build.evaluate.tasks.gate import Verdict
    from minitron_build.evaluate.tasks.models import Opened
    from minitron_build.evaluate.tasks.run import Asked

log = logging.getLogger(__name__)

_GRPC = "grpc://"

#: What means nothing without tasks.
FLAGS = ("data", "include", "shots", "limit", "allow_code", "url", "tokenizer", "transformers", "baseline", "tolerance",
         "output", "html")  # fmt: skip


def configure(group: argparse._ArgumentGroup) -> None:
    """Declare the arguments."""
    add = group.add_argument
    add("--tasks", metavar="NAME,NAME", help="ask the questions of these tasks or groups of tasks")
    add("--suite", metavar="NAME", help="or those of a suite, with its shots: minitron-card")
    add("--data", type=Path, metavar="DIR", help="where the questions lie: DIR/DATASET/CONFIGURATION/SPLIT.jsonl")
    add("--include", type=Path, metavar="DIR", help="folder with tasks of your own, as lm-eval's --include_path")
    add("--shots", type=int, metavar="N", help="questions shown with their answers (default: the task's own)")
    add("--limit", type=int, metavar="N", help="ask only the first N questions of each task")
    add("--allow-code", action="store_true", help="run programs that the model writes, in bubblewrap or a container")
    add("--url", metavar="URL", help="ask a running server too: http://HOST:PORT/v1 (OpenAI), grpc://HOST:PORT")
    add("--tokenizer", type=Path, metavar="DIR", help="folder of the served model's tokenizer, for --url")
    add("--transformers", nargs="?", const="float32", metavar="DTYPE",
        help="run Hugging Face folders by transformers, as lm-eval's model 'hf' (torch; default: float32)")  # fmt: skip
    add("--baseline", metavar="RUN",
        help="judge by a stored run (--output), or by the figures of the suite's card: 'card'")  # fmt: skip
    add("--tolerance", type=float, metavar="SHARE",
        help="how much worse than the baseline is good enough, as 0.01 for a point")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="store the run, with what each question was worth")
    add("--html", type=Path, metavar="FILE", help="write a page with tables and plots")


def run(args: argparse.Namespace) -> int:
    """Ask, show, store, and judge by --baseline."""
    from minitron_build.evaluate.tasks import gate, page
    from minitron_build.evaluate.tasks import run as asking

    _check(args)
    asking.need_lm_eval()
    asked = _asked(args)
    base = gate.read_baseline(args.baseline, asked.entries) if args.baseline else None
    loaded = asking.load(asked)
    document = asking.document(asked, args.suite)
    with interrupt.by_sigterm():
        document["subjects"] = _subjects(args, lambda model: asking.run(model, asked, loaded))
    if args.output:
        files.write_text(args.output, json.dumps(document, indent=1) + "\n")
    verdicts = {} if base is None else {one["name"]: gate.judge(one["tasks"], base, args.tolerance)
                                        for one in document["subjects"]}  # fmt: skip
    gated = {"baseline": args.baseline, "tolerance": args.tolerance,
             "outcomes": {name: gate.worst(found) for name, found in verdicts.items()},
             "verdicts": {name: [one.document() for one in found] for name, found in verdicts.items()}}  # fmt: skip
    if args.html:
        files.write_text(args.html, page.render(document, verdicts, args.baseline, args.tolerance))
    if args.json:
        console.emit_json(document | (gated if verdicts else {}))
    else:
        print(_table(document["subjects"]))
        for name, found in verdicts.items():
            print(f"\n{name} against {args.baseline}, tolerance {args.tolerance:g}\n{_verdicts(found)}")
    _end(verdicts, args.tolerance)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.tasks and args.suite:
        raise UsageError("--tasks and --suite exclude each other")
    if not args.candidates and not args.url:
        raise UsageError("there is nobody to ask; name a model, a checkpoint or an engine, or a server with --url")
    if args.suite and args.shots is not None:
        raise UsageError("a suite has its own shots; --shots goes with --tasks")
    if (args.baseline is None) != (args.tolerance is None):
        raise UsageError("--baseline and --tolerance go together")
    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise UsageError(
            f"--tolerance {args.tolerance:g} must be a share from 0 to below 1; 0.01 is a point of a hundred"
        )
    if args.baseline == "card" and not args.suite:
        raise UsageError("--baseline card goes with the suite that has the card's figures: --suite minitron-card")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit} leaves no question")


def _asked(args: argparse.Namespace) -> Asked:
    from minitron_build.evaluate.tasks import suites
    from minitron_build.evaluate.tasks.run import Asked

    entries = suites.suite(args.suite) if args.suite else suites.of_tasks(args.tasks.split(","), args.shots)
    if args.suite and not args.allow_code:
        for entry in entries:
            if entry.runs_code:
                log.warning(
                    "%s is left out: it runs programs that the model writes; --allow-code allows it", entry.task
                )
        entries = [entry for entry in entries if not entry.runs_code]
    return Asked(entries, args.data, args.include, args.limit, args.allow_code)


def _subjects(args: argparse.Namespace, ask: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Each subject's description with its results, one model in memory at a time."""
    from minitron_build.evaluate.tasks import models
    from minitron_build.evaluate.tasks.answers import open_answers

    found, noted = [], args.resume is not None
    with open_answers(args.resume) as answers:
        for name in args.candidates:
            with tempfile.TemporaryDirectory(prefix="minitron-eval-", dir=args.scratch) as scratch:
                if args.transformers:
                    opened = models.open_transformers(name, args.transformers, noted=noted)
                else:
                    opened = models.open_engine(name, Path(scratch), noted=noted)
                found.append(_results(opened, ask, answers))
                del opened
        if args.url:
            with _endpoint(args.url, args.tokenizer) as url:
                found.append(_results(models.open_server(args.url, url, args.tokenizer), ask, answers))
    return found


@contextmanager
def _endpoint(url: str, tokenizer: Path | None) -> Iterator[str]:
    """The OpenAI endpoint of a server; one of gRPC gets a gateway of its own for as long as it is asked.

    Over gRPC there are no log probs of a prompt, only all its logits, of which the gateway makes them.
    """
    if not url.startswith(_GRPC):
        yield url
        return
    words = ["gateway", "--listen", "127.0.0.1:0", "--json", "--upstream", url.removeprefix(_GRPC)]
    words += ["--tokenizer", str(tokenizer)] if tokenizer else []
    child = subprocess.Popen([*children.COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    try:
        lines = list(takewhile(lambda line: not line.startswith("}"), child.stdout))
        if child.poll() is not None or not lines:
            last = (list(child.stderr) or ["the gateway ended without a word"])[-1]
            raise NotReady(f"--url {url}: {last.strip().removeprefix('minitron: error: ')}")
        yield str(json.loads("".join(lines) + "}")["url"])
    finally:
        child.terminate()
        child.communicate()


def _results(opened: Opened, ask: Callable[[Any], dict[str, Any]], answers: AnswerStore) -> dict[str, Any]:
    from minitron_build.evaluate.tasks.answers import Noted

    name = opened.about["name"]
    return opened.about | {"tasks": ask(Noted(opened.model, name, opened.of or name, answers))}


def _table(subjects: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in subjects:
        for name, task in one["tasks"].items():
            rows += [[one["name"], name, task["shots"], task["count"], *figure] for figure in _figures(task)]
    return console.table(rows, ["", "task", "shots", "questions", "figure", "value", "standard error"])


def _figures(task: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a task is judged by, or, where that is no figure of questions, all that lm-eval gives."""
    if task["metric"]:
        return [(task["metric"], f"{task['value']:.4f}", f"{task['standard_error']:.4f}")]
    figures = [(key, value) for found in task["figures"].values() for key, value in found.items()]
    return [(key.removesuffix(",none"), f"{value:.6g}", "") for key, value in figures
            if isinstance(value, float) and "_stderr" not in key]  # fmt: skip


def _verdicts(found: Sequence[Verdict]) -> str:
    rows = []
    for one in found:
        if one.difference is None:
            rows.append([one.task, one.outcome, *[""] * 4, one.why])
            continue
        rows.append([one.task, one.outcome, f"{one.value:.4f}", f"{one.baseline:.4f}", f"{one.difference.value:+.4f}",
                     f"{one.difference.low:+.4f} to {one.difference.high:+.4f}", _how(one)])  # fmt: skip
    return console.table(rows, ["task", "verdict", "value", "baseline", "difference", "95 % interval", "how"])


def _how(one: Verdict) -> str:
    chance = f", p {one.probability:.2g}" if one.probability is not None else ""
    return f"{one.count} questions, {one.method}{chance}" + (f"; {_more(one)}" if one.outcome == "undecided" else "")


def _more(one: Verdict) -> str:
    if one.needed is None:
        return "the difference is as large as the tolerance: no number of questions would decide"
    return f"too few questions to decide: about {one.needed} are needed"


def _end(verdicts: dict[str, list[Verdict]], tolerance: float | None) -> None:
    """Raise VerdictError where a task fails, and Undecided where one cannot be told and none fails."""
    every = [(name, one) for name, found in verdicts.items() for one in found]
    for name, one in every:
        if one.outcome == "fail":
            raise VerdictError(
                f"{name} is worse than the baseline by more than {tolerance:g}: {one.task} has {one.value:.4f}, "
                f"and the baseline {one.baseline:.4f}"
            )
    for name, one in every:
        if one.outcome == "undecided":
            raise Undecided(f"{name}, {one.task}: {one.count} questions: {_more(one)}")
    if verdicts and not any(one.outcome == "pass" for _, one in every):
        raise Undecided("no task could be judged: " + "; ".join(f"{one.task}: {one.why}" for _, one in every))
