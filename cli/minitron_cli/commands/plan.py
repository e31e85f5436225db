"""``minitron plan``: memory, limits and the roofline of a recipe, before anything is built or downloaded."""

from __future__ import annotations

import argparse
import json

from minitron import console, recipe
from minitron.errors import NotEnoughMemory
from minitron.recipe import Effective


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipe.add_flags(parser, *dict(recipe.fields()))
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S",
        help="read bandwidth of this machine in 1e9 bytes/s, for target cpu (default: measured in a second)",
    )  # fmt: skip
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--show-recipe", action="store_true",
                       help="print every field of the recipe instead, and where its value came from")  # fmt: skip
    shown.add_argument("--list-recipes", action="store_true",
                       help="print the names of the recipes that come with the toolkit instead")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; fails with NotEnoughMemory where not one sequence fits."""
    if args.list_recipes:
        console.emit_json(recipe.shipped()) if args.json else print("\n".join(recipe.shipped()))
        return 0
    effective = recipe.from_args(args)
    if args.show_recipe:
        _show(effective, as_json=args.json)
        return 0
    from minitron_build.plan import engine_plan, model, show, this_machine

    wanted = effective.recipe
    here = None
    if wanted.target == "cpu":
        here = this_machine.roofline_machine(args.bandwidth * 1e9 if args.bandwidth else None)
    planned = engine_plan.plan(
        wanted, model.look_up(wanted.model), machine=here, capacity_bytes=this_machine.capacity_bytes()
    )
    console.emit_json(planned.document()) if args.json else print(show.text(planned))
    if not planned.fits:
        raise NotEnoughMemory(f"{planned.notes[0]}; what would: {'; or '.join(planned.remedies)}")
    return 0


def _show(effective: Effective, *, as_json: bool) -> None:
    if as_json:
        origins = effective.origins
        console.emit_json({"recipe": effective.name, "values": effective.recipe.model_dump(), "origins": origins})
        return
    rows = [(path, json.dumps(value), origin) for path, value, origin in effective.rows()]
    print(console.table(rows, ("field", "value", "from")))
