"""What a CPU server was predicted to take of the memory, beside what it took: one engine after the other, a table and
one JSON document.

Predicted and measured is what ``minitron.machine.cpu_memory`` says: private memory with a full KV cache, and the peak
while it loads. A server is loaded, is asked for a prompt that fills a step, for a full batch, and for other prompts
until its KV cache has been full; what it takes at most is looked at all the time.

    make bench-memory                                                 # all engines of a random model of the 1b shape
    make bench-memory ARGS="--models models/small-minitron --heads as_is --json out.json"
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import circling_model
import source_tree
from cpu_figures import instruction_sets
from cpu_sides import Server
from cpu_workload import ALL_FILLERS, Workload
from minitron_serve import minitron_serve
from process_memory import MemoryWatch

from minitron import console
from minitron.machine import memory
from minitron.model.precision import ROUNDED
from minitron_triton.server import cpu_memory

_WORK = source_tree.ROOT / "out" / "bench-memory"
_BATCH, _LONGEST, _PROMPT, _OUTPUT = 8, 320, 256, 4
_KV_TOKENS = 1024
_LOOK_S = 0.1


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", type=Path, help="Hugging Face folders (default: a random model of the 1b shape)")
    add("--precisions", nargs="+", choices=[kind.value for kind in ROUNDED],
        default=["bfloat16", "int8_weight_only", "int4_weight_only"])  # fmt: skip
    add("--executions", nargs="+", choices=("exact", "fast"), default=["exact", "fast"])
    add("--heads", nargs="+", choices=("as_is", "int8", "screened"), default=["as_is", "int8", "screened"])
    add("--work", type=Path, default=_WORK, help="where checkpoints and engines go")
    add("--json", type=Path, help="default: WORK/bench-memory.json; rows that it has are kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.models:
        args.models = [args.work / "circling-1b"]
        circling_model.write(args.models[0], "1b", ALL_FILLERS)
    path = args.json or args.work / "bench-memory.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = [row["engine"] for row in rows]
    for model, precision, execution, head in itertools.product(
        args.models, args.precisions, args.executions, args.heads
    ):
        engine = [model.name, precision, execution, head]
        if engine not in done:
            rows.append({"engine": engine, **_measure(args.work, model, precision, execution, head)})
            document = {"instruction_sets": instruction_sets(), "kv_tokens": _KV_TOKENS, "rows": rows}
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(_table(rows[-1:]), flush=True)
    print("\n" + _table(rows) + f"\n\nwritten to {path}")
    return 0


def _measure(work: Path, model: Path, precision: str, execution: str, head: str) -> dict[str, Any]:
    """Predicted and measured bytes of one engine's server; engine and repository are removed again."""
    checkpoint, engine, repository = (work / f"{model.name}-{end}" for end in (precision, "engine", "repository"))
    if not checkpoint.exists():
        source_tree.run(source_tree.ROOT, "convert", model, "--output", checkpoint, "--precision", precision)
    for left in (engine, repository):
        shutil.rmtree(left, ignore_errors=True)
    source_tree.run(
        source_tree.ROOT, "build", checkpoint, "--target", "cpu", "--output", engine, "--execution", execution,
        "--head", head, "--max-batch-size", _BATCH, "--max-seq-len", _LONGEST, "--max-input-len", _LONGEST, "--json",
    )  # fmt: skip
    source_tree.run(
        source_tree.ROOT, "render", engine, "--output", repository, "--max-tokens-in-paged-kv-cache", _KV_TOKENS
    )
    expected = cpu_memory.of_repository(repository, memory.available_bytes())
    found = _served(work, model, repository)
    for left in (engine, repository):
        shutil.rmtree(left)
    predicted = {"private": expected.private, "peak": expected.total}
    return {
        "predicted": predicted | {"parts": vars(expected)},
        "measured": found,
        "ratios": {key: round(predicted[key] / found[key], 3) for key in predicted},
        "load_average": os.getloadavg(),
    }


def _served(work: Path, model: Path, repository: Path) -> dict[str, int]:
    """Private memory and peak in bytes, of a server that loads, works, and has had a full cache."""
    watches: list[MemoryWatch] = []

    def watching(pid: int) -> Any:
        watches.append(MemoryWatch(pid, each_page_once=True))
        return watches[-1].watching(_LOOK_S)

    workload = Workload(model, False, _PROMPT, 32, _OUTPUT, (_BATCH,), False)
    with ExitStack() as stack:
        _, state = stack.enter_context(minitron_serve(repository, work, while_loading=watching))
        watch = watches[0]
        loading = watch.peak
        side = Server("server", watch, state["urls"]["grpc"], 0.0)
        stack.callback(side.close)
        for number in range(1 + _KV_TOKENS // (_PROMPT + _BATCH * 32)):
            workload.measure(side, number)
    return {"private": watch.private, "peak": max(loading, watch.private)}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [" ".join(row["engine"]), *(console.human_bytes(row[kind][key]) for kind in ("predicted", "measured")),
         f"{row['ratios'][key]:.2f}", key]
        for row in rows for key in ("private", "peak")
    ]  # fmt: skip
    return console.table(lines, ("engine", "predicted", "measured", "ratio", ""))


if __name__ == "__main__":
    sys.exit(main())
