"""Convert a full-size GGUF file of random Q4_K and Q6_K weights, against a plain copy of the checkpoint it becomes.

The file is llama.cpp's Q4_K_M in types and size, its blocks from a cyclic random pool; the tokenizer is the small
Minitron's, filled up. The copy is bench_convert.py's. Runs alternate; memory is the conversion's own peak.

    python benches/bench_gguf.py                      # the 4B shape: 3 GB, and up to 9 GB for each output
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minitron import console

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "models")]

import bench_convert  # noqa: E402

import gguf_files  # noqa: E402
import random_model  # noqa: E402

_POOL_BLOCKS = 65_521  # a prime
#: ggml's number, bytes of a block of 256 weights, and where in it the float16 scales lie.
_Q4_K, _Q6_K = (12, 144, (0, 2)), (14, 210, (208,))


def main() -> int:
    """Write the file, measure, print JSON."""
    args = _arguments()
    shape = random_model.SHAPES[args.shape]
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / f"random-{args.shape}-Q4_K_M.gguf"
    if not path.exists():
        _write(path, shape)
    rows = [_row(path, args, precision) for precision in args.precisions]
    shown = [[row["precision"], *(f"{row[key]:.2f}" for key in ("copy_s", "s", "ratio")), _all(row["ratios"]),
              console.human_bytes(row["peak_memory_bytes"])] for row in rows]  # fmt: skip
    print(console.table(shown, ["", "copy s", "s", "ratio", "ratios of the rounds", "peak memory"]))
    report = {"machine": bench_convert.machine(), "gguf_bytes": path.stat().st_size, "rows": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.json}")
    return 0


def _row(path: Path, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Conversion and copy in turn; medians, and the largest memory."""
    converted, copied = [], []
    for round_ in range(args.rounds):
        converted.append(_convert(path, args.work, precision))
        copied.append(_copy(args.work))
        print(f"{precision}, round {round_ + 1}: {converted[-1]['wall_s']:.1f} s, copy {copied[-1]:.1f} s",
              file=sys.stderr, flush=True)  # fmt: skip
    shutil.rmtree(args.work / "bench-gguf-output")
    ratios = [one["wall_s"] / copy for one, copy in zip(converted, copied, strict=True)]
    return {
        "precision": precision,
        "s": statistics.median(one["wall_s"] for one in converted),
        "copy_s": statistics.median(copied),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in converted),
        "checkpoint_bytes": converted[0]["checkpoint_bytes"],
    }


def _all(ratios: list[float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="minitron-4b", choices=random_model.SHAPES)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "int8_weight_only", "int4_weight_only"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "out", help="where the model and the outputs go")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench-gguf.json")
    return parser.parse_args()


def _write(path: Path, shape: Any) -> None:
    """Metadata from a tiny model's folder with this shape's numbers; tensors streamed from pools of random blocks."""
    import dataclasses

    pick = np.random.default_rng(0)
    pools = {kind[0]: _pool(kind, pick) for kind in (_Q4_K, _Q6_K)}
    with tempfile.TemporaryDirectory() as scratch:
        small = dataclasses.replace(random_model.SHAPES["tiny"], vocab_size=shape.vocab_size, hidden_size=256,
                                    intermediate_size=256, num_layers=1)  # fmt: skip
        random_model.write_random_model(Path(scratch) / "m", small)
        config = random_model.hugging_face_config(shape)
        (Path(scratch) / "m" / "config.json").write_text(json.dumps(config))
        metadata = gguf_files.metadata_of(Path(scratch) / "m")
    gguf_files.write(path, metadata, list(_tensors(shape, pools)))


def _pool(kind: tuple[int, int, tuple[int, ...]], pick: np.random.Generator) -> bytes:
    _, size, scales = kind
    blocks = pick.integers(0, 256, (_POOL_BLOCKS, size), dtype=np.uint8)
    for place in scales:
        small = pick.uniform(1e-4, 3e-4, _POOL_BLOCKS).astype(np.float16)
        blocks[:, place : place + 2] = small.view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def _tensors(shape: Any, pools: dict[int, bytes]) -> Iterator[gguf_files.Tensor]:
    for tensor in random_model.tensors(shape):
        name = gguf_files.llama_cpp_name(tensor.name)
        if len(tensor.shape) == 1:
            yield name, tensor.shape, 0, np.ones(tensor.shape, np.float32).tobytes()
            continue
        number, size, _ = _Q6_K if name == "output.weight" or "attn_v" in name or "ffn_down" in name else _Q4_K
        needed = math.prod(tensor.shape) // 256 * size
        pool = pools[number]
        yield name, tensor.shape, number, (pool * (needed // len(pool) + 1))[:needed]


def _convert(path: Path, work: Path, precision: str) -> dict[str, Any]:
    target = work / "bench-gguf-output"
    shutil.rmtree(target, ignore_errors=True)
    argv = [sys.executable, "-m", "minitron_cli", "convert", str(path), "--precision", precision,
            "--output", str(target), "--json"]  # fmt: skip
    started = time.monotonic()
    found: dict[str, Any] = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    return found | {"wall_s": time.monotonic() - started}


def _copy(work: Path) -> float:
    target = work / "bench-gguf-copy"
    shutil.rmtree(target, ignore_errors=True)
    argv = [sys.executable, str(ROOT / "benches" / "bench_convert.py"), "--worker", "copy",
            str(work / "bench-gguf-output"), str(target)]  # fmt: skip
    started = time.monotonic()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - started
    shutil.rmtree(target, ignore_errors=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
