"""``minitron plan``: memory, limits and the roofline of a recipe, before anything is built or downloaded."""

from __future__ import annotations

import argparse

from minitron import console, recipe
from minitron.errors import NotEnoughMemory


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipe.add_flags(
        parser, "model.source", "model.revision", "model.activations", "precision", "dtype", "target",
        "tensor_parallel", "pipeline_parallel", "workload.concurrency", "workload.input_tokens",
        "workload.output_tokens", "cpu.execution", "cpu.lm_head",
    )  # fmt: skip
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S",
        help="read bandwidth of this machine in 1e9 bytes/s, for target cpu (default: measured in a second)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; fails with NotEnoughMemory where not one sequence fits."""
    from minitron_build.plan import engine_plan, model, show, this_machine

    wanted = recipe.from_args(args).recipe
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
