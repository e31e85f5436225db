"""What fast mode should do on this machine: the figures behind a row of ``core/minitron/data/cpu_machines.yaml``.

The bare pipeline with the same weights under several settings of the plugin, in turns, each in a process of its own.
By default the 4B shape with few layers, whose products have the full size: a step's time beside others' is what counts.

    python benches/bench_fast.py --precisions int4_weight_only int8_weight_only
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cpu_sides

from minitron import console
from minitron.machine import cpu_machines

ROOT = Path(__file__).parent.parent
#: Name: what differs from the engine as it is built, plugin settings and limits.
VARIANTS: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "as built": ({}, {}),
    "no groups": ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, {}),
    "groups of 32": ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}, {}),
    "groups of 64": ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}, {}),
    "groups of 128": ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}, {}),
    "groups of 256": ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "256"}, {}),
    "KV in bf16": ({"KV_CACHE_PRECISION": "bf16"}, {}),
    "steps of 128": ({}, {"max_num_tokens": 128}),
    "steps of 512": ({}, {"max_num_tokens": 512}),
}
_STREAMS = (1, 4, 16)
_KV_TOKENS = 8192


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["int4_weight_only", "int8_weight_only"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-fast")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench-fast.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [row for precision in args.precisions for row in _measure(args, precision)]
    keys = ["ttft_512_s", *(f"tokens_per_s_{streams}" for streams in _STREAMS)]
    print(console.table([[row["precision"], row["variant"], *(f"{row[key]:.2f}" for key in keys)] for row in rows],
                        ["", "", *keys]))  # fmt: skip
    machine = cpu_machines.this_machine().machine
    report = {"machine": machine, "load_average": os.getloadavg(), "layers": args.layers, "rows": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.json}")
    return 0


def _measure(args: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    engine = _engine(args, precision)
    sides: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(cpu_sides.bare(_variant(engine, name, *differs), _KV_TOKENS))
            for name, differs in VARIANTS.items()
        }
        for number in range(args.rounds):
            for name in list(VARIANTS)[:: -1 if number % 2 else 1]:
                sides[name].append(_round(opened[name], number))
    medians = [
        {key: statistics.median(found[key] for found in rounds) for key in rounds[0]} for rounds in sides.values()
    ]
    return [
        {"precision": precision, "variant": name, **figures} for name, figures in zip(VARIANTS, medians, strict=True)
    ]


def _round(side: cpu_sides.Child, number: int) -> dict[str, float]:
    figures = {"ttft_512_s": side.ask([_text(f"{number} a", 512)], 1)["ttft_s"]}
    for streams in _STREAMS:
        done = side.ask([_text(f"{number} {streams} {index}", 16) for index in range(streams)], 16)
        figures[f"tokens_per_s_{streams}"] = done["tokens"] / done["seconds"]
    return figures


def _text(mark: str, tokens: int) -> str:
    """About so many tokens that no cached beginning has (the random models' tokenizer takes a word for some)."""
    return f"{mark} " + "river " * (tokens // 2)


def _engine(args: argparse.Namespace, precision: str) -> Path:
    """The fast engine of a random model, made once."""
    work: Path = args.work
    model, checkpoint, engine = (work / name for name in ("model", precision, f"{precision}-engine"))
    run = [sys.executable, "-m", "minitron_cli"]
    if not model.exists():
        _run([sys.executable, ROOT / "models" / "random_model.py", "--shape", "minitron-4b", "--layers", args.layers,
              "--output", model])  # fmt: skip
    if not checkpoint.exists():
        _run([*run, "convert", model, "--precision", precision, "--output", checkpoint])
    _run([*run, "build", checkpoint, "--target", "cpu", "--execution", "fast", "--max-seq-len", 2048, "--force",
          "--output", engine])  # fmt: skip
    return engine


def _variant(engine: Path, name: str, properties: dict[str, str], limits: dict[str, int]) -> Path:
    """The engine's files once more, under another config.json."""
    folder = engine.with_name(f"{engine.name}-{name.replace(' ', '-')}")
    folder.mkdir(exist_ok=True)
    for path in engine.iterdir():
        if path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
    config["cpu"]["properties"] |= properties
    config["build_config"] |= limits
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Path(folder)


def _run(words: list[Any]) -> None:
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
