"""``minitron doctor``: what this machine can do for a recipe, and what to do about what it cannot."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import console, recipe
from minitron.errors import MachineError, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipe.add_flags(
        parser, "target", "precision", "tensor_parallel", "pipeline_parallel",
        "serving.grpc_port", "serving.http_port", "serving.metrics_port", "container.image_tag",
        "container.image",
    )  # fmt: skip
    parser.add_argument("--engine", type=Path, metavar="DIR", help="whether the memory holds this CPU engine, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line for each check and a summary; fails where something that the recipe needs is missing."""
    from minitron_cli.doctor import diagnose

    effective = recipe.from_args(args)
    if args.engine and effective.recipe.target != "cpu":
        raise UsageError(f"--engine is of target cpu, and recipe {effective.name} of {effective.recipe.target}")
    found = diagnose(effective.recipe, Path.cwd(), args.engine)
    if args.json:
        console.emit_json({
            "recipe": effective.name, "target": effective.recipe.target, "ok": found.healthy,
            "checks": [vars(check) for check in found.checks], "can": found.can, "cannot": found.cannot,
        })  # fmt: skip
    else:
        print(f"recipe {effective.name}, target {effective.recipe.target}\n")
        rows = [(check.level, check.subject, check.message, check.remedy) for check in found.checks]
        print(console.table(rows, ("", "what", "found", "remedy")))
        print("\nThis machine can:   " + ("; ".join(found.can) or "nothing yet"))
        print("This machine cannot: " + ("; ".join(found.cannot) or "nothing is missing"))
    return 0 if found.healthy else MachineError.exit_code
