"""Requests an hour of ``minitron eval``'s tasks on a CPU engine: sharing how texts begin, against each text alone.

Texts have the lengths of the card's tasks, cut from the held-out chapters: MMLU (five examples that all questions begin
with, four letters), HellaSwag (ten examples of its own for each question, four endings), GSM8K (five examples of its
own, a written answer). Rounds alternate; a ratio is the median of the rounds' own. Needs the extra ``eval``:

    .venv-reference/bin/python benches/bench_eval.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minitron import console

ROOT = Path(__file__).parent.parent
_PROMPT, _ENDING, _ANSWER = 80, 25, 96  # tokens of an example, of an ending, of a written answer


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "small-minitron"), help="what 'minitron eval' takes")
    parser.add_argument("--questions", type=int, default=16, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from minitron_build.evaluate.candidate import prepare
    from minitron_build.evaluate.tasks.engine_model import EngineModel

    with tempfile.TemporaryDirectory(prefix="bench-eval-") as scratch:
        subject = prepare(args.model, Path(scratch))
        model = EngineModel(subject.engine, subject.max_tokens)
        rows = [[name, len(requests), *_compared(ask, requests, args.rounds)]
                for name, ask, requests in _kinds(model, args.questions)]  # fmt: skip
    head = ["as", "requests", "an hour, shared", "an hour, each alone", "ratio"]
    print(console.table(rows, head), file=sys.stdout)


def _kinds(model: Any, count: int) -> list[tuple[str, Callable[[list[Any]], Any], list[Any]]]:
    chapters = json.loads((ROOT / "tests" / "data" / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    ids, place = model.tok_encode("\n\n".join(chapters)), 0

    def text(length: int) -> list[int]:
        nonlocal place
        place = (place + 37) % (len(ids) - length)
        return list(ids[place : place + length])

    score, write = model._loglikelihood_tokens, model.generate_until
    examples = text(5 * _PROMPT)
    mmlu = [
        ("", examples + question, [letter]) for question in (text(60) for _ in range(count)) for letter in range(9, 13)
    ]
    shown = [text(10 * _PROMPT) for _ in range(count)]
    hellaswag = [("", context, text(_ENDING)) for context in shown for _ in range(4)]
    wish = {"until": [], "max_gen_toks": _ANSWER, "do_sample": False}
    prompts = [model._tokens.decode(text(5 * _PROMPT)) for _ in range(count)]
    gsm8k = [SimpleNamespace(args=(prompt, wish)) for prompt in prompts]
    return [("MMLU", score, mmlu), ("HellaSwag", score, hellaswag), ("GSM8K", write, gsm8k)]


def _compared(ask: Callable[[list[Any]], Any], requests: list[Any], rounds: int) -> list[str]:
    """Requests an hour both ways, and how many times as many the first is."""
    together, alone = [], []
    ask(requests[:4])  # memory and kernels are there then
    for _ in range(rounds):
        together.append(_seconds(lambda: ask(requests)))
        alone.append(_seconds(lambda: [ask([one]) for one in requests]))
    ratio = statistics.median(slow / fast for slow, fast in zip(alone, together, strict=True))
    return [*(f"{3600 * len(requests) / statistics.median(some):,.0f}" for some in (together, alone)), f"{ratio:.1f}"]


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
