"""``minitron plan``: memory, limits and the roofline of a recipe, before anything is built or downloaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from minitron import console, recipe
from minitron.errors import NotEnoughMemory, UsageError
from minitron.recipe import Effective

if TYPE_CHECKING:
    from minitron_build.plan.engine_plan import EnginePlan
    from minitron_build.plan.roofline import Machine
    from minitron_build.plan.simulation import Arrival
    from minitron_build.plan.traffic import Sizing


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
    parser.add_argument("--traffic", metavar="PROFILE",
        help="say how many servers and gateways the arrivals of this load profile need, by simulation")  # fmt: skip
    parser.add_argument(
        "--slo", metavar="TTFT,ITL", help="limits in ms that 95 %% of the requests are to meet, for --traffic"
    )
    parser.add_argument("--roofline-share", type=float, default=1.0, metavar="SHARE",
        help="part of the roofline that an engine reaches (default %(default)g: the best case)")  # fmt: skip
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
    from minitron_build.plan import engine_plan, model, show, this_machine, traffic

    wanted = effective.recipe
    here = None
    if wanted.target == "cpu":
        here = this_machine.roofline_machine(args.bandwidth * 1e9 if args.bandwidth else None)
    planned = engine_plan.plan(
        wanted, model.look_up(wanted.model), machine=here, capacity_bytes=this_machine.capacity_bytes()
    )
    sizing = _sizing(args, planned, here)
    if args.json:
        console.emit_json(planned.document() | ({"traffic": sizing.document()} if sizing else {}))
    else:
        print(show.text(planned) + (f"\n\n{traffic.text(sizing)}" if sizing else ""))
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


def _sizing(args: argparse.Namespace, planned: EnginePlan, here: Machine | None) -> Sizing | None:
    """What --traffic asks; None where it is not given."""
    from minitron_build.plan import traffic

    if (args.traffic is None) != (args.slo is None):
        raise UsageError("--traffic and --slo go together: a traffic needs limits, and limits a traffic")
    if args.traffic is None:
        return None
    if not 0 < args.roofline_share <= 1:
        raise UsageError(f"--roofline-share {args.roofline_share:g} must be above 0 and at most 1")
    return traffic.size(planned, here, _arrivals(args.traffic), traffic.Slo.parse(args.slo), share=args.roofline_share)


#: Requests of a simulation at the least: enough for its 95th percentile to stand still.
_REQUESTS = 2000


def _arrivals(name: str) -> list[Arrival]:
    """The requests that 'minitron bench' would send by a profile, of more time where it sends only a few."""
    from minitron_build.plan.simulation import Arrival
    from minitron_client.bench import profile, schedule

    wanted = profile.load(name)
    if wanted.arrival.kind in ("constant", "poisson", "gamma"):
        longer = max(wanted.duration_s, _REQUESTS / wanted.arrival.rate)
        wanted = wanted.model_copy(update={"duration_s": longer})
    planned = schedule.plan(wanted)
    if not planned or planned[0].at_ns is None:
        raise UsageError(f"the load profile {name} has no times of arrival ({wanted.arrival.kind}), so no traffic")
    return [Arrival((one.at_ns or 0) / 1e9, one.input_tokens, one.output_tokens) for one in planned]
