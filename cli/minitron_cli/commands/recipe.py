"""``minitron recipe show``: the values that hold, and which layer each came from."""

from __future__ import annotations

import argparse
import json

from minitron import console, recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print every field with its value and where that came from")
    recipe.add_flags(show, *dict(recipe.fields()))
    show.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    names = actions.add_parser("list", help="name the recipes that come with the toolkit")
    names.add_argument("--json", action="store_true", help="print one JSON document instead of a list")


def run(args: argparse.Namespace) -> int:
    """Print the recipe, or the names of those there are."""
    if args.action == "list":
        console.emit_json(recipe.shipped()) if args.json else print("\n".join(recipe.shipped()))
        return 0
    effective = recipe.from_args(args)
    if args.json:
        origins = effective.origins
        console.emit_json({"recipe": effective.name, "values": effective.recipe.model_dump(), "origins": origins})
        return 0
    rows = [(path, json.dumps(value), origin) for path, value, origin in effective.rows()]
    print(console.table(rows, ("field", "value", "from")))
    return 0
