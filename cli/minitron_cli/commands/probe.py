"""``minitron probe``: ask TensorRT-LLM itself about the toolkit's data file, a checkpoint or an engine."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from minitron import acceptance, recipe
from minitron.acceptance import Line
from minitron.errors import UsageError
from minitron.machine import compat
from minitron.recipe import Effective


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    subjects = parser.add_subparsers(metavar="WHAT", dest="subject", required=True)
    tool = subjects.add_parser("tool", help="trtllm-build's flags and defaults, and the versions in the image")
    checkpoint = subjects.add_parser("checkpoint", help="does TensorRT-LLM load it, and make the same codes and scales")
    checkpoint.add_argument("folder", type=Path, metavar="CHECKPOINT", help="made by 'minitron convert'")
    checkpoint.add_argument("--files-only", action="store_true", help="hash the files, and ask no TensorRT-LLM")
    engine = subjects.add_parser("engine", help="does its config.json say what was planned")
    engine.add_argument("folder", type=Path, metavar="ENGINE", help="made by 'minitron build'")
    for subject in (tool, checkpoint):
        subject.add_argument("--container", action="store_true", help="ask in the pinned image, with docker")
        subject.add_argument("--timeout", type=float, metavar="S", help="give up after so many seconds")
        subject.add_argument("--log", type=Path, metavar="FILE", help="keep what TensorRT-LLM prints")
    recipe.add_flags(tool, "container.image_tag", "model.source", "target")
    recipe.add_flags(checkpoint, "container.image_tag", "model.source", "model.revision")
    for subject in (tool, checkpoint, engine):
        subject.add_argument("--output", type=Path, metavar="FILE", help="store the lines as JSON")
        subject.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Judge, print; exit code 8 where a line failed."""
    with tempfile.TemporaryDirectory() as scratch:
        judged = _judged(args, Path(scratch))
    return acceptance.report(judged, to=args.output, as_json=args.json, subject=args.subject)


def _command(effective: Effective) -> list[str]:
    """trtllm-build as the recipe's plan would run it; of a recipe for no GPU, its name alone."""
    from minitron_build.engines.tensorrt import build, flags

    if effective.recipe.target == "cpu" or effective.recipe.backend == "llmapi":
        return [flags.PROGRAM]
    options = build.Options()
    return build.decide_ahead(effective, Path("checkpoint"), Path("engine"), options).command()


def _judged(args: argparse.Namespace, scratch: Path) -> list[Line]:
    from minitron_build.probe import checkpoint, engine, tool
    from minitron_build.probe.asking import Place

    if args.subject == "engine":
        return engine.judge_engine(args.folder)
    if args.subject == "checkpoint" and args.files_only:
        return checkpoint.judge_files(args.folder)
    wanted = recipe.from_args(args).recipe
    image = compat.image(wanted.container.image_tag)
    place = Place(image.reference if args.container else None, wanted.container,
                  args.log or scratch / "log", args.timeout)  # fmt: skip
    if args.subject == "tool":
        return tool.judge_tool(place, image, _command(recipe.from_args(args)))
    if args.model is None:
        raise UsageError("codes and scales are compared with those of the source model; give --model")
    loading = checkpoint.judge_loading(place, args.folder)
    codes = checkpoint.judge_codes(place, args.folder, wanted.model.source, wanted.model.revision)
    return [*checkpoint.judge_files(args.folder), *loading, *codes]
