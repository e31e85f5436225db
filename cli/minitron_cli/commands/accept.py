"""``minitron accept``: everything that a recipe promises, judged check by check on the machine that is to serve it.

Steps and their order are in ``accept.acceptance``. What was finished is kept in the output folder; started again, an
acceptance goes on where it was, and repeats only what failed or whose inputs changed. Parts of it, and what is there
already (a checkpoint, an engine, the repository of a server that runs, stored tokens), can be judged alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron import children, console, interrupt, recipe
from minitron.errors import UsageError, VerdictError
from minitron.recipe import Effective
from minitron.recipe_model import Recipe

if TYPE_CHECKING:
    from minitron_cli.accept.acceptance import Acceptance
    from minitron_cli.accept.subject import AcceptanceSubject


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from minitron_client.client.arguments import add_security

    add = parser.add_argument
    there = "a checkpoint, an engine, a repository whose server runs, or a file of stored tokens: judge that alone"
    add("subject", nargs="?", type=Path, metavar="PATH", help=there)
    add("--only", nargs="+", metavar="PART", default=[],
        help="judge these alone, and anew: tool, checkpoint, engine, server, tokens, behaviour, speed, another step of "
        "--dry-run, or single checks such as behaviour.stop_words; without PATH and recipe, of the one server that "
        "runs")  # fmt: skip
    recipe.add_flags(parser, "model.source", "model.revision", "target", "container.image_tag",
                     "container.image")  # fmt: skip
    place = "where it works, with its evidence (default out/accept-RECIPE-MODEL, or by PATH)"
    add("--output", type=Path, metavar="DIR", help=place)
    reference = "tokens that 'minitron accept --target cpu' stored for this checkpoint (default: made on the spot)"
    add("--reference", type=Path, metavar="DIR|FILE", help=reference)
    add("--tolerance", type=float, metavar="NATS",
        help="how much log probs may differ (default: by activation type, float16 0.1, bfloat16 0.5)")  # fmt: skip
    add("--new-tokens", type=int, metavar="N", help="tokens of each of the prompts (default 64)")
    add("--baseline", type=Path, metavar="RUN", help="stored 16-bit latency run (default: built and measured here)")
    add("--eval", metavar="WORDS",
        help="ask the server tasks too, and hold the gate: words of 'minitron eval' in quotes, such as "
        "'--tasks gsm8k --data DIR --baseline RUN --tolerance 0.01'")  # fmt: skip
    points = "the three points (default: of the recipe's workload)"
    add("--grid", nargs=3, metavar="INPUT:OUTPUT:CONCURRENCY", help=points)
    here = "ask and build with the TensorRT-LLM of this machine; serving takes the container all the same"
    add("--no-container", dest="container", action="store_false", help=here)
    add("--fresh", action="store_true", help="judge everything anew")
    add("--small", type=Path, metavar="MODEL",
        help="a small model that goes the whole way first (default: models/small-minitron where it is)")  # fmt: skip
    add("--llmapi", action="store_true", help="serve the model by the LLM API too, and ask it once")
    add("--keep-going", action="store_true", help="go on where a cheap proof failed that would end the hour early")
    add("--dry-run", action="store_true", help="print steps with their time and money, and checks, and do nothing")
    add("--price", type=float, metavar="USD", help="what an hour of the machine costs, for --dry-run")
    add("--compare", type=Path, metavar="FILE",
        help="hold --output's finished acceptance against another acceptance.json, and run nothing")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document instead of a table")
    server = parser.add_argument_group("a server that runs")
    add = server.add_argument
    add("--state", type=Path, metavar="FOLDER", help="the --state given to 'minitron serve'")
    add("--url", metavar="HOST:PORT", help="its gRPC address (default: that of the server that runs here)")
    add("--http-url", metavar="HOST:PORT", help="with --url: its HTTP address; without it only gRPC is asked")
    add("--metrics-url", metavar="HOST:PORT", help="with --url: its metrics; without them cancelling cannot be seen")
    add_security(server)


def run(args: argparse.Namespace) -> int:
    """Go the way; exit code 8 where a check failed."""
    from minitron_cli.accept import quality, subject, walk

    effective = recipe.from_args(args)
    if effective.recipe.backend == "llmapi":
        raise UsageError("backend llmapi has no checkpoint and no engine to accept; take a recipe with backend engine")
    if args.dry_run:
        print(_shown(args.price))
        return 0
    only, tasks = walk.chosen(args.only), quality.words_of(args.eval)
    alone = subject.find(args, effective, only)
    folder = args.output or (alone.folder if alone else _folder(effective))
    if args.compare:
        return _compare(folder, args.compare, as_json=args.json)
    with children.only_user_of(folder, "acceptance"), interrupt.by_sigterm():
        acceptance = _acceptance(args, effective, folder, only, alone, tasks=tasks)
        report = _walk(acceptance, _about(effective, acceptance), folder, partly=bool(acceptance.options.only))
    console.emit_json(report) if args.json else print(_result(report, folder))
    return VerdictError.exit_code if report["verdict"] == "FAIL" else 0


def _folder(effective: Effective) -> Path:
    return Path("out", f"accept-{Path(effective.name).stem}-{Path(effective.recipe.model.source).name}")


def _acceptance(
    args: argparse.Namespace, effective: Effective, folder: Path, only: Mapping[str, frozenset[str]],
    alone: AcceptanceSubject | None, *, tasks: tuple[str, ...],
) -> Acceptance:  # fmt: skip
    from minitron_cli.accept import speed
    from minitron_cli.accept.acceptance import Acceptance, Options, write_recipe
    from minitron_cli.accept.evidence import Evidence
    from minitron_cli.accept.serving import end_leftovers

    wanted, only = (alone.recipe, alone.only) if alone else (effective.recipe, only)
    if "tokens" in only and args.reference:
        only = {**only, "words": frozenset({"words.same"})}
    evidence = Evidence(folder / "evidence", fresh=args.fresh, anew=only)
    options = Options(
        reference=args.reference, baseline=args.baseline, grid=tuple(args.grid or speed.grid(wanted)),
        container=args.container, small=_small(args.small, wanted), llmapi=args.llmapi, keep_going=args.keep_going,
        only=only, tolerance=args.tolerance, new_tokens=args.new_tokens, tasks=tasks,
    )  # fmt: skip
    acceptance = Acceptance(wanted, folder, evidence, options, alone.given if alone else {},
                            alone.running if alone else None)  # fmt: skip
    write_recipe(wanted, acceptance.recipe_file)
    end_leftovers(evidence)
    return acceptance


def _about(effective: Effective, acceptance: Acceptance) -> dict[str, Any]:
    wanted = acceptance.recipe
    return {
        "recipe": effective.name, "target": wanted.target, "model": wanted.model.source,
        "precision": wanted.precision, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _walk(acceptance: Acceptance, about: dict[str, Any], folder: Path, *, partly: bool) -> dict[str, Any]:
    """All checks; the documents are written after every step, so that an end in between leaves what there is.

    ``partly``: nothing is written, for a part is no acceptance.
    """
    from minitron_cli.accept import numbers, page

    found: list[Any] = []
    seconds: dict[str, float | None] = {}
    for step, judged in acceptance.walk():
        found += judged
        seconds[step] = acceptance.evidence.seconds(step)
        if not partly:
            page.write(folder, page.document(
                found, about | {"finished": False}, seconds, numbers.collect(folder, seconds)))  # fmt: skip
    report = page.document(found, about | {"finished": not partly}, seconds, numbers.collect(folder, seconds))
    if not partly:
        page.write(folder, report)
    return report


def _result(report: dict[str, Any], folder: Path) -> str:
    from minitron_cli.accept import page

    return f"{page.text(report)}\nevidence: {folder / 'acceptance.html' if report['finished'] else folder / 'evidence'}"


def _small(given: Path | None, wanted: Recipe) -> Path | None:
    """The model that goes first: the one named, or the repository's own where it is not what is accepted anyway."""
    if given is not None:
        return given
    own = Path("models", "small-minitron")
    return own if own.is_dir() and own.resolve() != Path(wanted.model.source).resolve() else None


def _compare(folder: Path, other: Path, *, as_json: bool) -> int:
    from minitron_cli.accept import numbers

    compared = numbers.side_by_side(numbers.read(folder / "acceptance.json"), numbers.read(other))
    console.emit_json(compared) if as_json else print(numbers.text(compared))
    return 0


def _shown(price: float | None) -> str:
    from minitron.checks import catalogue
    from minitron_cli.accept import hour

    rows = [(entry.step, entry.name, "GPU" if entry.gpu else "any", entry.question) for entry in catalogue().values()]
    checks = console.table(rows, ("step", "check", "target", "holds that"))
    return f"{hour.table(hour.default_price() if price is None else price)}\n\n{checks}"
