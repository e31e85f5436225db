"""``minitron inspect``: the tensors of a checkpoint or of a GGUF file."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from minitron import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint, or a GGUF file")
    parser.add_argument("--source", metavar="MODEL", help="model it was made of: adds each tensor's relative error")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--json", action="store_true", help="print the list as one JSON document")


def run(args: argparse.Namespace) -> int:
    """List the tensors and their totals."""
    from minitron_build.sources import gguf_inspect

    if args.checkpoint.is_file():
        found = gguf_inspect.inspect(args.checkpoint)
        console.emit_json(found) if args.json else print(gguf_inspect.text(found))
        return 0
    from minitron_build.checkpoint.inspect import about, inspect

    is_ = about(args.checkpoint)
    tensors = inspect(args.checkpoint, args.source, args.revision)
    total = sum(tensor.nbytes for tensor in tensors)
    if args.json:
        console.emit_json(is_ | {"tensors": [asdict(tensor) for tensor in tensors], "bytes": total})
        return 0
    rows = [
        [tensor.rank, tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), f"{tensor.nbytes:,}",
         "" if tensor.relative_error is None else f"{tensor.relative_error:.3%}"]
        for tensor in tensors
    ]  # fmt: skip
    head = ["rank", "tensor", "dtype", "shape", "bytes", "relative error"]
    print(console.table([row if args.source else row[:-1] for row in rows], head if args.source else head[:-1]))
    print("\n" + ", ".join(f"{key} {value}" for key, value in is_.items() if value is not None))
    by_type = Counter[str]()
    for tensor in tensors:
        by_type[tensor.dtype] += tensor.nbytes
    parts = ", ".join(f"{dtype} {console.human_bytes(count)}" for dtype, count in sorted(by_type.items()))
    print(f"{len(tensors):,} tensors, {console.human_bytes(total)} ({parts})")
    return 0
