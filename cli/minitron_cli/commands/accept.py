"""``minitron accept``: everything that a recipe promises, judged line by line on the machine that is to serve it.

Steps and their order are in ``acceptance.way``. What was finished is kept in the output folder; started again, an
acceptance goes on where it was, and repeats only what failed or whose inputs changed.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minitron import children, console, interrupt, recipe
from minitron.errors import UsageError, VerdictError
from minitron.recipe import Effective
from minitron.recipe_model import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipe.add_flags(parser, "model.source", "model.revision", "target", "container.image_tag")
    add = parser.add_argument
    place = "where it works, with its evidence (default out/accept-RECIPE-MODEL)"
    add("--output", type=Path, metavar="DIR", help=place)
    reference = "tokens that 'minitron accept --target cpu' stored for this checkpoint (default: made on the spot)"
    add("--reference", type=Path, metavar="DIR|FILE", help=reference)
    add("--baseline", type=Path, metavar="RUN", help="stored 16-bit latency run (default: built and measured here)")
    points = "the three points (default: of the recipe's workload)"
    add("--grid", nargs=3, metavar="INPUT:OUTPUT:CONCURRENCY", help=points)
    here = "ask and build with the TensorRT-LLM of this machine; serving takes the container all the same"
    add("--no-container", dest="container", action="store_false", help=here)
    add("--fresh", action="store_true", help="judge everything anew")
    add("--small", type=Path, metavar="MODEL",
        help="a small model that goes the whole way first (default: models/small-minitron where it is)")  # fmt: skip
    add("--llmapi", action="store_true", help="serve the model by the LLM API too, and ask it once")
    add("--keep-going", action="store_true", help="go on where a cheap proof failed that would end the hour early")
    add("--dry-run", action="store_true", help="print steps with their time and money, and lines, and do nothing")
    add("--price", type=float, metavar="USD", help="what an hour of the machine costs, for --dry-run")
    add("--compare", type=Path, metavar="FILE",
        help="hold --output's finished acceptance against another acceptance.json, and run nothing")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Go the way; exit code 8 where a line failed."""
    from minitron_cli.accept import speed
    from minitron_cli.accept.evidence import Evidence
    from minitron_cli.accept.serving import end_leftovers
    from minitron_cli.accept.way import Way
    from minitron_cli.accept.work import Options, write_recipe

    effective = recipe.from_args(args)
    wanted = effective.recipe
    if wanted.backend == "llmapi":
        raise UsageError("backend llmapi has no checkpoint and no engine to accept; take a recipe with backend engine")
    if args.dry_run:
        print(_shown(args.price))
        return 0
    folder = args.output or Path("out", f"accept-{Path(effective.name).stem}-{Path(wanted.model.source).name}")
    if args.compare:
        return _compare(folder, args.compare, as_json=args.json)
    with children.alone_in(folder, "acceptance"), interrupt.by_sigterm():
        evidence = Evidence(folder / "evidence", fresh=args.fresh)
        points = tuple(args.grid or speed.grid(wanted))
        way = Way(wanted, folder, evidence, Options(
            reference=args.reference, baseline=args.baseline, grid=points, container=args.container,
            small=_small(args.small, wanted), llmapi=args.llmapi, keep_going=args.keep_going,
        ))  # fmt: skip
        write_recipe(wanted, way.recipe_file)
        end_leftovers(evidence)
        whole = _walk(way, _about(effective), folder)
    console.emit_json(whole) if args.json else print(_result(whole, folder))
    return VerdictError.exit_code if whole["verdict"] == "FAIL" else 0


def _about(effective: Effective) -> dict[str, Any]:
    return {
        "recipe": effective.name, "target": effective.recipe.target, "model": effective.recipe.model.source,
        "precision": effective.recipe.precision, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _walk(way: Any, about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All lines; the documents are written after every step, so that an end in between leaves what there is."""
    from minitron_cli.accept import numbers, page

    lines: list[Any] = []
    seconds: dict[str, float | None] = {}
    for step, judged in way.walk():
        lines += judged
        seconds[step] = way.evidence.seconds(step)
        found = numbers.collect(folder, seconds)
        page.write(folder, page.document(lines, about | {"finished": False}, seconds, found))
    whole = page.document(lines, about | {"finished": True}, seconds, numbers.collect(folder, seconds))
    page.write(folder, whole)
    return whole


def _result(whole: dict[str, Any], folder: Path) -> str:
    from minitron_cli.accept import page

    return f"{page.text(whole)}\nevidence: {folder / 'acceptance.html'}"


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
    from minitron.acceptance import catalogue
    from minitron_cli.accept import hour

    rows = [(entry.step, entry.id, "GPU" if entry.gpu else "any", entry.what) for entry in catalogue().values()]
    lines = console.table(rows, ("step", "line", "target", "holds that"))
    return f"{hour.table(hour.default_price() if price is None else price)}\n\n{lines}"
