"""What an answer is worth, of the tasks beside this file; lm-eval calls it by name from there."""

from __future__ import annotations

from typing import Any

from minitron_build.evaluate.tasks import sandbox


def rouge_l(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L's F measure of a summary, words as they are written (no stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"]).score(doc["summary"], results[0])
    return {"rougeL": float(scores["rougeL"].fmeasure)}


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the program passes the question's own tests, in a sandbox."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(sandbox.passes(program))}
