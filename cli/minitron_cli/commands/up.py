"""``minitron up``: the stages of a recipe brought up to date, then served if that is wanted; or the whole way shown.

Behind ``make convert``, ``make build``, ``make repo``, ``make a100`` and ``make demo``. The stages and when one is done
are ``minitron_cli.pipeline``'s.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from minitron import children, console, interrupt, recipe
from minitron.errors import UsageError
from minitron.recipe import Effective
from minitron_cli.pipeline import OF_THE_SERVER, STAGES, Pipeline, flags_of, show

_CHECKOUT = Path(__file__).parents[3]
_SMALL_MODEL = Path("models", "small-minitron")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipe.add_flags(
        parser, "model.source", "model.revision", "target", "precision", "dtype", "cpu.execution",
        "container.image_tag", "container.image", *(f"serving.{name}" for name in OF_THE_SERVER),
    )  # fmt: skip
    add = parser.add_argument
    place = "where the stages' folders lie (default out/RECIPE-MODEL, with --demo out/demo)"
    add("--output", type=Path, metavar="DIR", help=place)
    add("--until", choices=STAGES, default=STAGES[-1], help="how far to go (default %(default)s: all of it)")
    add("--container", action="store_true", help="run trtllm-build in the pinned image, where the target is a GPU")
    add("--fresh", action="store_true", help="make everything anew, also what is up to date")
    add("--dry-run", action="store_true", help="print every command and run none")
    add("--serve", action="store_true", help="then serve the repository, as 'minitron serve' does")
    add("--detach", action="store_true", help="with --serve: return when the server is ready; 'minitron stop' ends it")
    add("--demo", action="store_true",
        help="then serve on free ports, stream an answer, measure, stop, and print what each took")  # fmt: skip
    add("--prompt", default="In the beginning", help="what --demo has continued (default %(default)r)")


def run(args: argparse.Namespace) -> int:
    """Go the way; the exit code is that of the first command that fails, or 0."""
    effective = _effective(args)
    model = Path(effective.recipe.model.source).name
    named = Path("out", "demo" if args.demo else f"{Path(effective.name).stem}-{model}")
    folder: Path = args.output or named
    if (args.demo or args.serve) and args.until != STAGES[-1]:
        raise UsageError(f"--until {args.until} ends before there is anything to serve")
    if args.demo and args.serve:
        raise UsageError("--demo ends with a server that is stopped, --serve with one that runs; give one of them")
    pipeline = Pipeline(folder, effective, container=args.container, dry_run=args.dry_run, fresh=args.fresh)
    alone = contextlib.nullcontext() if args.dry_run else children.only_user_of(folder, "'minitron up'")
    with alone, interrupt.by_sigterm():
        if args.demo:
            from minitron_cli.demo import Demo

            Demo(folder, pipeline, effective).run(args.prompt, dry_run=args.dry_run)
            return 0
        pipeline.bring_up_to_date(args.until)
    if not args.dry_run:
        print("\n" + console.table(pipeline.times, ("stage", "seconds")))
    if args.serve:
        _serve(pipeline.repository, effective, detach=args.detach, dry_run=args.dry_run)
    return 0


def _effective(args: argparse.Namespace) -> Effective:
    """The recipe; where nothing names a model, that of the checkout."""
    effective = recipe.from_args(args)
    if effective.name == "defaults" and effective.origins["model.source"] == "default":
        args.model = _small_model()
        return recipe.from_args(args)
    return effective


def _small_model() -> str:
    for folder in (Path.cwd(), _CHECKOUT):
        if (folder / _SMALL_MODEL).is_dir():
            return str(_SMALL_MODEL if folder == Path.cwd() else folder / _SMALL_MODEL)
    raise UsageError(
        f"no model was given, and {_SMALL_MODEL} is not here (it comes with a checkout of the project): give --model, "
        "a Hugging Face folder or id such as nvidia/Minitron-4B-Base, or a GGUF file"
    )


def _serve(repository: Path, effective: Effective, *, detach: bool, dry_run: bool) -> None:
    """Become the server: it needs nothing of what the stages left in memory, and signals reach it directly."""
    words = ["serve", str(repository), *(["--detach"] if detach else [])]
    words += flags_of(effective, words)
    show(f"\n$ minitron {shlex.join(words)}")
    if not dry_run:
        sys.stdout.flush()
        os.execv(children.COMMAND[0], [*children.COMMAND, *words])
