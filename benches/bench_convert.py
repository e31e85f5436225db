"""Conversions of a full-size random model against a plain copy of its tensors, in alternating runs.

A plain copy reads each tensor with the safetensors library, writes it, hashes what was read and what was written, and
flushes to the disk at the end: what any converter must do at least. A conversion is measured in a process of its own,
as a user starts it, so that its peak memory is its own and mapped pages are counted. Before each run the files it reads
are read once (``--cache warm``) or dropped from the page cache (``--cache cold``), and what earlier runs wrote is
deleted and flushed. ``build --target cpu`` is held against the same copy of the checkpoint that it reads.

    python benches/bench_convert.py                         # the 4B shape, all precisions
    python benches/bench_convert.py --shape 1b --rounds 3   # a quicker look
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from minitron import console
from minitron.machine import memory
from minitron.model.precision import ROUNDED

ROOT = Path(__file__).parent.parent
PRECISIONS = tuple(kind.value for kind in ROUNDED)


def main() -> int:
    """Measure, print a table, write JSON."""
    args = _arguments()
    if args.worker:
        return _work(args)
    model = args.work / f"random-{args.shape.removeprefix('minitron-')}"
    if not model.exists():
        _run([sys.executable, str(ROOT / "models" / "random_model.py"), "--shape", args.shape, "--output", str(model),
              "--no-tokenizer"])  # fmt: skip
    rows = _conversions(args, model) if args.convert else []
    if args.build:
        rows += [_build(args, model, precision) for precision in args.precisions]
    shown = [[row["what"], *(_figure(row.get(key)) for key in _COLUMNS)] for row in rows]
    print(console.table(shown, ["", "copy s", "s", "ratio", "without hashes", "peak memory"]))
    report = {
        "machine": machine(),
        "model": _describe(model),
        "cache": args.cache,
        "rounds": args.rounds,
        "rows": rows,
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.json}")
    return 0


_COLUMNS = ("copy_seconds", "seconds", "ratio", "ratio_without_hashes", "peak_memory_bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="minitron-4b", help="shape of models/random_model.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="page cache before each run")
    parser.add_argument("--no-convert", dest="convert", action="store_false", help="leave the conversions out")
    parser.add_argument("--no-build", dest="build", action="store_false", help="leave 'build --target cpu' out")
    parser.add_argument("--work", type=Path, default=ROOT / "out", help="where models and outputs go")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench-convert.json")
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--no-hashes", dest="hashes", action="store_false", help=argparse.SUPPRESS)
    return parser.parse_args()


def _conversions(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Copy and every conversion in turn, ``rounds`` times with hashes and once without; medians of the ratios."""
    runs: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for hashes in [True] * args.rounds + [False]:
        for what in ("copy", *args.precisions):
            print(f"{what}{'' if hashes else ', without hashes'} ...", file=sys.stderr, flush=True)
            runs.setdefault((what, hashes), []).append(_measure(args, what, model, hashes))
    return [
        {
            "what": f"convert {precision}",
            "copy_seconds": _median(run["seconds"] for run in runs["copy", True]),
            "seconds": _median(run["seconds"] for run in runs[precision, True]),
            "ratio": _ratio(runs[precision, True], runs["copy", True]),
            "ratio_without_hashes": _ratio(runs[precision, False], runs["copy", False]),
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs[precision, True]),
            "seconds_of_all_runs": [run["seconds"] for run in runs[precision, True]],
            "copy_seconds_of_all_runs": [run["seconds"] for run in runs["copy", True]],
        }
        for precision in args.precisions
    ]


def _build(args: argparse.Namespace, model: Path, precision: str) -> dict[str, Any]:
    """``build --target cpu`` from a checkpoint against a copy of that checkpoint."""
    checkpoint = args.work / "bench-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    minitron = [sys.executable, "-m", "minitron_cli"]
    _run([*minitron, "convert", str(model), "--output", str(checkpoint), "--precision", precision])
    copies, builds = [], []
    for _ in range(args.rounds):
        print(f"copy of and build from {precision} ...", file=sys.stderr, flush=True)
        copies.append(_measure(args, "copy", checkpoint, True))
        with _clean(args, checkpoint) as target:
            started = time.monotonic()
            done = _run([*minitron, "build", str(checkpoint), "--target", "cpu", "--output", str(target), "--json"])
            builds.append({"seconds": time.monotonic() - started} | _memory(done))
    shutil.rmtree(checkpoint)
    return {
        "what": f"build {precision}",
        "copy_seconds": _median(run["seconds"] for run in copies),
        "seconds": _median(run["seconds"] for run in builds),
        "ratio": _ratio(builds, copies),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in builds),
    }


def _memory(done: str) -> dict[str, float]:
    return {"peak_memory_bytes": json.loads(done)["peak_memory_bytes"]}


def _measure(args: argparse.Namespace, what: str, model: Path, hashes: bool) -> dict[str, float]:
    """Seconds and peak memory of one run in a process of its own."""
    with _clean(args, model) as target:
        argv = [sys.executable, __file__, "--worker", what, str(model), str(target)]
        started = time.monotonic()
        done = _run(argv if hashes else [*argv, "--no-hashes"])
        found = {"seconds": time.monotonic() - started} | _memory(done)
    print(f"  {found['seconds']:.1f} s, {console.human_bytes(found['peak_memory_bytes'])}", file=sys.stderr, flush=True)
    return found


class _clean:  # noqa: N801 - used like a function
    """A free place for an output, with the page cache of ``model`` in the wanted state; deleted afterwards."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self._cache, self._model, self._target = args.cache, model, args.work / "bench-output"

    def __enter__(self) -> Path:
        shutil.rmtree(self._target, ignore_errors=True)
        os.sync()
        for path in sorted(self._model.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while self._cache == "warm" and file.read(16 << 20):
                    pass
        return Path(self._target)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._target, ignore_errors=True)


def _work(args: argparse.Namespace) -> int:
    """One run, in the process that was made for it."""
    what, model, target = args.worker
    with mock.patch("hashlib.sha256", hashlib.sha256 if args.hashes else _NoHash):
        if what == "copy":
            _copy(Path(model), Path(target))
        else:
            from minitron_build.checkpoint.convert import convert

            convert(model, target, precision=what)
    console.emit_json({"peak_memory_bytes": memory.peak_bytes()})
    return 0


class _NoHash:
    """Stands in for hashlib.sha256, to show what hashing costs."""

    def __init__(self, _: bytes = b"") -> None: ...

    def update(self, _: object) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Return no digest of anything."""
        return "0" * 64


def _copy(model: Path, target: Path) -> None:
    """Copy every tensor, with one SHA-256 over what is read and one over what is written, and flush."""
    import ml_dtypes  # noqa: F401 - gives numpy its bfloat16
    import numpy as np
    from safetensors import safe_open

    read, written = hashlib.sha256(), hashlib.sha256()
    target.mkdir()
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as source, open(target / path.name, "wb", buffering=0) as file:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                data = source.get_tensor(name).reshape(-1).view(np.uint8).data
                read.update(data)
                written.update(data)
                while data:
                    data = data[file.write(data) :]
            os.fsync(file.fileno())


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr}")
    return done.stdout


def _median(values: Any) -> float:
    return float(round(statistics.median(values), 2))


def _ratio(runs: list[dict[str, float]], copies: list[dict[str, float]]) -> float:
    """Median of the ratios to the copy of the same round."""
    return _median(run["seconds"] / copy["seconds"] for run, copy in zip(runs, copies, strict=True))


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e6 else console.human_bytes(value)


def _describe(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    sizes = {path.name: path.stat().st_size for path in sorted(model.glob("*.safetensors"))}
    return {"config": config, "bytes": sum(sizes.values()), "files": len(sizes)}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    names = ("numpy", "ml-dtypes", "safetensors", "minitron-trtllm", "openvino")
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    processor = _processor()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load_average_at_the_end": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in names if name in installed},
    }


if __name__ == "__main__":
    sys.exit(main())
