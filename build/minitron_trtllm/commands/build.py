"""``minitron build``: a checkpoint becomes an engine for one target."""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from minitron_trtllm import output
from minitron_trtllm.manifest import Manifest


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder that 'minitron convert' made")
    parser.add_argument("--target", default="cpu", metavar="TARGET", help="what the engine runs on: cpu (default)")
    parser.add_argument("--output", type=Path, required=True, help="engine folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing output, on success")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    limits = parser.add_argument_group("limits of the engine", "in tokens; derived from the model where not given")
    limits.add_argument("--max-batch-size", type=int, metavar="N", help="sequences that generate at the same time")
    limits.add_argument("--max-input-len", type=int, metavar="N", help="of a prompt")
    limits.add_argument("--max-seq-len", type=int, metavar="N", help="of prompt and output together")
    limits.add_argument("--max-num-tokens", type=int, metavar="N", help="in one step, over all sequences")
    cpu = parser.add_argument_group("target cpu")
    cpu.add_argument(
        "--execution",
        choices=("exact", "fast"),
        default="exact",
        help="exact: float32, what the checkpoint says (default); fast: bfloat16 and 8-bit activations and keys/values",
    )
    cpu.add_argument(
        "--lm-head-int8", action="store_true", help="store the output projection in int8 (not what the checkpoint says)"
    )


def run(args: argparse.Namespace) -> int:
    """Build for the target that was asked for."""
    started = time.monotonic()
    record = _BUILDERS[_target(args.target)](args)
    _report(args, record, time.monotonic() - started)
    return 0


def _target(name: str) -> str:
    from minitron_trtllm.errors import UsageError

    if name not in _BUILDERS:
        raise UsageError(f"there is no target {name!r}; known: {', '.join(_BUILDERS)}")
    return name


def _build_cpu(args: argparse.Namespace) -> Manifest:
    from minitron_trtllm.engine import openvino

    options = openvino.CpuOptions(
        execution=args.execution,
        lm_head_int8=args.lm_head_int8,
        max_batch_size=args.max_batch_size,
        max_input_len=args.max_input_len,
        max_seq_len=args.max_seq_len,
        max_num_tokens=args.max_num_tokens,
    )
    return openvino.build(args.checkpoint, args.output, options, force=args.force)


_BUILDERS = {"cpu": _build_cpu}


def _report(args: argparse.Namespace, record: Manifest, seconds: float) -> None:
    size = sum(file.size for file in record.files.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.json:
        output.emit_json(
            {
                "output": str(args.output),
                "bytes": size,
                "seconds": round(seconds, 3),
                "peak_memory_bytes": peak,
                "digest": record.digest,
                **record.details,
            }
        )
        return
    limits = record.details["limits"]
    rows = [
        ("engine", args.output),
        ("target", f"{record.details['target']}, {record.details['precision']}, {record.details.get('execution', '')}"),
        ("limits", ", ".join(f"{name} {value}" for name, value in limits.items())),
        ("size", output.human_bytes(size)),
        ("time", f"{seconds:.1f} s"),
        ("peak memory", output.human_bytes(peak)),
    ]
    print(output.table(rows, ("", "")))
