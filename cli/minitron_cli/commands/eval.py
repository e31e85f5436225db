"""``minitron eval``: what a precision or a quantisation costs, on a text or on tasks, before a GPU is rented."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron import console, interrupt
from minitron.errors import UsageError, VerdictError
from minitron.model import activations
from minitron.model.activations import Activations
from minitron_cli import task_evaluation as tasks

if TYPE_CHECKING:
    from minitron_build.evaluate.compare import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("candidates", nargs="*", metavar="CANDIDATE", help="model folder, GGUF file, checkpoint or CPU engine")
    add("--scratch", type=Path, metavar="DIR",
        help="folder for engines and distributions (default: the system's temporary one)")  # fmt: skip
    add("--resume", type=Path, metavar="FILE",
        help="note what is done in FILE, and go on from what an ended run noted there")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document instead of a table")
    _configure_text(parser.add_argument_group("on a text: perplexity, KL divergence, agreement (docs/quality.md)"))
    tasks.configure(parser.add_argument_group("on tasks of lm-eval's (docs/evaluation.md)"))


def _configure_text(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--reference", metavar="MODEL", help="what they are compared with: any of these, unquantised")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to predict, which the model was not trained on")
    add("--context", type=int, metavar="N", help="tokens of a window (default: 512)")
    add("--tokens", type=int, metavar="N", help="take only the first N tokens of the text")
    add("--activations", type=Path, metavar="FILE",
        help="store how far the reference's activations reach, for the plan and convert")  # fmt: skip
    add("--max-kl", type=float, metavar="NATS", help="fail where the mean KL divergence of a candidate is larger")


def run(args: argparse.Namespace) -> int:
    """Compare on a text and judge by --max-kl, or ask the questions of tasks and judge by --baseline."""
    if args.tasks or args.suite:
        _refuse(args, ("reference", "text", "context", "tokens", "activations", "max_kl"), "tasks are not asked with")
        return tasks.run(args)
    _refuse(args, tasks.FLAGS, "without --tasks or --suite there is no")
    return _compare(args)


def _refuse(args: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    if given := [flag for flag in flags if getattr(args, flag) not in (None, False)]:
        raise UsageError(f"{why} --{given[0].replace('_', '-')}")


def _compare(args: argparse.Namespace) -> int:
    from minitron_build.evaluate.compare import compare

    if not args.reference or not args.text:
        raise UsageError("give --reference and --text, or the tasks to ask: --tasks or --suite")
    if not args.candidates and not args.activations:
        raise UsageError("there is no candidate to compare; name one, or give --activations to look at the reference")
    if args.tokens is not None and args.tokens < 2:
        raise UsageError(f"--tokens {args.tokens} leaves nothing to predict; at least 2 are needed")
    with interrupt.by_sigterm():
        report = compare(args.reference, args.candidates, args.text, context=args.context, tokens=args.tokens,
                         scratch=args.scratch, resume=args.resume)  # fmt: skip
    if args.activations and report.complete:
        _store(report, args.activations)
    if args.json:
        console.emit_json(_finite(vars(report) | {"max_kl": args.max_kl}))
    else:
        print(table(report))
    if not report.complete:
        raise KeyboardInterrupt
    worst = report.worst()
    if args.max_kl is not None and worst is not None and not worst["mean_kl"] <= args.max_kl:
        raise VerdictError(
            f"{worst['name']} has a mean KL divergence of {worst['mean_kl']:.6g}, more than {args.max_kl:g}"
        )
    return 0


def table(report: Report) -> str:
    """The figures, the reference first, and where they end if they were not all measured."""
    rows = [_cells(row) for row in ([report.reference] if report.reference else []) + report.candidates]
    head = ["", "stored", "size", "tokens", "perplexity", "mean KL", "99 % KL", "top-1 agreement", "top-p agreement"]
    shown = [console.table(rows, head), *_overflows(report)]
    return "\n\n".join(shown if report.complete else [*shown, _interruption(report)])


def _overflows(report: Report) -> list[str]:
    """What float16 would do to these activations, said once for each model that was measured."""
    told = []
    for row in [report.reference, *report.candidates]:
        if "activations" in row:
            measured = Activations.of(row["activations"], row["name"])
            told += [f"{row['name']}: {warning}" for warning in activations.warnings("float16", measured)]
    return told


def _store(report: Report, path: Path) -> None:
    if "activations" not in report.reference:
        raise UsageError("the reference is an engine of an older build, whose activations cannot be seen; give a model")
    activations.write(path, Activations.of(report.reference["activations"], report.reference["name"]))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interruption(report: Report) -> str:
    begun = f"INTERRUPTED: figures are of the first tokens, as many as their column says, of {report.text['predicted']}"
    return f"{begun}; not begun: {', '.join(report.not_begun)}" if report.not_begun else begun


def _cells(row: dict[str, Any]) -> list[str]:
    figures = ["", "", "", ""]
    if "mean_kl" in row:
        shares = [f"{100 * row[key]:.2f} %" for key in ("top1_agreement", "top_p_agreement")]
        figures = [f"{row['mean_kl']:.6f}", f"{row['p99_kl']:.6f}", *shares]
    size = console.human_bytes(row["bytes"])
    return [row["name"], row["precision"], size, str(row["tokens"]), f"{row['perplexity']:.4f}", *figures]
