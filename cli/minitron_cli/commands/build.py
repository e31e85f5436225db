"""``minitron build``: a checkpoint becomes an engine for one target."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from minitron import console, recipe
from minitron.artifacts.manifest import Manifest
from minitron.errors import UsageError
from minitron.machine import memory
from minitron.recipe import Effective


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "checkpoint", type=Path, help="folder that 'minitron convert', ModelOpt or NVIDIA's scripts made"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR",
                        help="folder of a tokenizer for the engine: others' checkpoints bring none")  # fmt: skip
    parser.add_argument("--output", type=Path, help="engine folder to make (default: out/engines/NAME-DIGEST)")
    parser.add_argument("--force", action="store_true", help="replace something else at the output, on success")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    recipe.add_flags(
        parser, "model.source", "target", "precision", "tensor_parallel", "pipeline_parallel",
        "workload.concurrency", "workload.input_tokens", "workload.output_tokens",
        "limits.max_batch_size", "limits.max_input_len", "limits.max_seq_len", "limits.max_num_tokens",
        "cpu.execution", "cpu.lm_head", "cpu.overflow", "container.image_tag",
    )  # fmt: skip
    parser.add_argument("--lm-head-int8", dest="lm_head", action="store_const", const="int8", help=argparse.SUPPRESS)
    parser.add_argument("--lm-head", dest="lm_head", help=argparse.SUPPRESS)
    gpu = parser.add_argument_group("GPU targets")
    gpu.add_argument("--container", action="store_true", help="run trtllm-build in the pinned image, with docker")
    gpu.add_argument("--dry-run", action="store_true", help="print the command line and build nothing")
    gpu.add_argument("--workers", type=int, metavar="N", help="ranks to build at a time (default: all)")
    gpu.add_argument("--timeout", type=float, metavar="S", help="stop trtllm-build after so many seconds")


def run(args: argparse.Namespace) -> int:
    """Build for the target that was asked for, or say that it is built."""
    started = time.monotonic()
    effective = recipe.from_args(args)
    if effective.recipe.backend == "llmapi":
        raise UsageError("backend llmapi needs no engine: go on with 'minitron render MODEL --backend llmapi'")
    if effective.recipe.target == "cpu":
        return _build_cpu(args, effective, started)
    return _build_gpu(args, effective, started)


def _build_cpu(args: argparse.Namespace, effective: Effective, started: float) -> int:
    from minitron_build.engines.openvino import build

    if args.container or args.dry_run or args.workers or args.timeout:
        raise UsageError("--container, --dry-run, --workers and --timeout are for GPU targets")
    place, record, found = build.build(
        effective, args.checkpoint, args.output, force=args.force, tokenizer=args.tokenizer
    )
    peak = memory.peak_bytes()
    _report(args, place, record, found, {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak})
    return 0


def _build_gpu(args: argparse.Namespace, effective: Effective, started: float) -> int:
    from minitron_build.engines.tensorrt import build

    options = build.Options(args.container, args.workers, args.timeout, args.force, args.tokenizer)
    ahead = args.dry_run and not args.checkpoint.exists()
    decide = build.decide_ahead if ahead else build.decide
    decided = decide(effective, args.checkpoint, args.output, options)
    if args.dry_run:
        argv = decided.command()
        console.emit_json({"output": str(decided.output), "argv": argv}) if args.json else print(shlex.join(argv))
        return 0
    record, found = build.run(decided)
    cost = {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": record.details["build_peak_bytes"]}
    _report(args, decided.output, record, found, cost)
    return 0


def _settings(properties: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in properties.items())


def _report(args: argparse.Namespace, place: Path, record: Manifest, found: bool, cost: dict[str, float]) -> None:
    size = sum(file.size for file in record.files.values())
    if args.json:
        summary = {"output": str(place), "cached": found, "bytes": size, **cost, "digest": record.digest}
        console.emit_json(summary | record.details)
        return
    if found:
        print(f"{place} is there already and is what was asked for; nothing was built")
    details = record.details
    rows = [
        ("engine", place),
        ("target", f"{details['target']}, {details['precision']}, {details.get('execution', details.get('image'))}"),
        *([("runs", f"{_settings(details['properties'])} ({details['because']})")] if "properties" in details else []),
        ("limits", ", ".join(f"{name} {value}" for name, value in details["limits"].items())),
        ("size", console.human_bytes(size)),
        ("time", f"{cost['seconds']:.1f} s"),
        ("peak memory", console.human_bytes(cost["peak_memory_bytes"]) if cost["peak_memory_bytes"] else "not known"),
    ]
    print(console.table(rows, ("", "")))
