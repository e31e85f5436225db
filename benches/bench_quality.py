"""What every precision and GGUF kind costs: perplexity, KL divergence, agreement against the unquantised model.

GGUF files are made by llama.cpp itself, in a Python that has it (``--llama-python``; the extra ``reference`` brings it
to Python 3.11). Everything made stays in ``--work`` until it is made again: for a 4B model the files add up to 75 GB.

    python benches/bench_quality.py                                      # the small Minitron, held-out chapters
    python benches/bench_quality.py --model DIR --text FILE --calibration FILE --tokens 8192
    python benches/bench_quality.py --outliers                           # a random model with outlier channels instead
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "tests" / "data" / "small_minitron" / "held_out.json"
CALIBRATION = ROOT / "tests" / "data" / "small_minitron" / "calibration.txt"
PRECISIONS = ("bfloat16", "float16", "int8_weight_only", "int4_weight_only")
#: Name, and what convert is told, of four bits in groups; the last one is calibrated.
GROUPS = (
    ("int4_weight_only groups of 128", ["--precision", "int4_weight_only", "--group-size", "128"]),
    ("int4_weight_only groups of 64", ["--precision", "int4_weight_only", "--group-size", "64"]),
    ("int4_awq groups of 128", ["--precision", "int4_awq"]),
    ("int4_awq groups of 64", ["--precision", "int4_awq", "--group-size", "64"]),
)
#: Name, precision of the checkpoint, and what the build is told.
ENGINES = (
    ("bfloat16 int8-head", "bfloat16", ["--head", "int8"]),
    ("bfloat16 screened-head", "bfloat16", ["--head", "screened"]),
    ("int8_weight_only int8-head", "int8_weight_only", ["--head", "int8"]),
    ("int4_weight_only int8-head", "int4_weight_only", ["--head", "int8"]),
    ("int4_weight_only screened-head", "int4_weight_only", ["--head", "screened"]),
    ("int4_weight_only fast as-is-head", "int4_weight_only", ["--execution", "fast", "--head", "as_is"]),
    ("bfloat16 fast", "bfloat16", ["--execution", "fast"]),
    ("int8_weight_only fast", "int8_weight_only", ["--execution", "fast"]),
    ("int4_weight_only fast", "int4_weight_only", ["--execution", "fast"]),
)
GGUF_KINDS = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0")


def main() -> int:
    """Make everything, measure it, print a table, write JSON."""
    args = _arguments()
    if args.make_gguf:
        return _make_gguf(args.model, *args.make_gguf)
    from minitron_build.evaluate.compare import compare
    from minitron_cli.commands.eval import table

    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    if args.outliers:
        args.model = _with_outliers(args.work / "outliers")
    text = args.text or _held_out(args.work)
    report = compare(str(args.model), _made(args), text, context=args.context, tokens=args.tokens, scratch=args.work)
    for row in report.candidates:
        row["name"] = Path(row["name"]).stem.replace("_", " ")
    print(table(report))
    args.json.write_text(json.dumps(vars(report), indent=1) + "\n")
    print(f"\nwritten to {args.json}")
    return 0 if report.complete else 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "small-minitron", help="Hugging Face folder")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: the small Minitron's held-out chapters)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window")
    parser.add_argument("--tokens", type=int, help="take only the first of the text")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="text that int4_awq is calibrated with")
    parser.add_argument("--outliers", action="store_true", help="measure a random model with outlier channels")
    parser.add_argument("--llama-python", default=sys.executable, help="Python with llama.cpp's wheels")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "quality")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench-quality.json")
    parser.add_argument("--make-gguf", nargs=2, metavar=("KIND", "OUTPUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _held_out(work: Path) -> Path:
    (work / "held_out.txt").write_text("\n\n".join(json.loads(HELD_OUT.read_text(encoding="utf-8"))), encoding="utf-8")
    return work / "held_out.txt"


def _made(args: argparse.Namespace) -> list[str]:
    """Checkpoints, engines and GGUF files, by their paths."""
    minitron = [sys.executable, "-m", "minitron_cli"]
    made = []
    for precision in PRECISIONS:
        made.append(str(args.work / precision))
        _run([*minitron, "convert", str(args.model), "--precision", precision, "--output", made[-1]])
    for name, options in GROUPS:
        made.append(str(args.work / name))
        calibration = ["--calibration", str(args.calibration), "--calibration-tokens", str(args.context)]
        _run([*minitron, "convert", str(args.model), *options, *calibration, "--output", made[-1]])
    if args.outliers:
        return made
    for name, precision, options in ENGINES:
        made.append(str(args.work / name))
        _run([*minitron, "build", str(args.work / precision), "--target", "cpu", *options, "--output", made[-1]])
    for kind in GGUF_KINDS:
        path = str(args.work / f"GGUF {kind}.gguf")
        argv = [args.llama_python, __file__, "--model", str(args.model), "--make-gguf", kind, path]
        if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
            made.append(path)
        else:
            print(f"no GGUF {kind}: {args.llama_python} has no working llama.cpp (extra 'reference', Python 3.11)",
                  file=sys.stderr)  # fmt: skip
    return made


def _with_outliers(folder: Path) -> Path:
    """A random model of the small Minitron's shape, six channels of each norm 8 to 32 times as large as the others.

    So are trained models: a few channels carry most of the activations' magnitude, the same ones in every layer
    (T. Dettmers et al., "LLM.int8()", arXiv 2208.07339).
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    sys.path.insert(0, str(ROOT / "models"))
    import random_model
    from minitron.model import shape

    random_model.write_random_model(folder, shape.read(random_model.SMALL_MINITRON / "config.json"), seed=4)
    generator, file = np.random.default_rng(4), folder / "model.safetensors"
    weights = load_file(file)
    channels = generator.choice(len(weights["model.norm.weight"]), 6, replace=False)
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):  # stored as weight - 1
            raised = weight.astype(np.float32)
            raised[channels] = (raised[channels] + 1) * 2 ** generator.uniform(3, 5, 6) - 1
            weights[name] = raised.astype(weight.dtype)
    save_file(weights, file, {"format": "pt"})
    return folder


def _make_gguf(model: Path, kind: str, output: str) -> int:
    """In the Python that has llama.cpp: convert to bfloat16 once, quantise."""
    sys.path.insert(0, str(ROOT / "tests"))
    import llama_cpp

    whole = Path(output).with_name("whole-bf16.gguf")
    if not whole.exists():
        llama_cpp.convert(model, whole, "bf16")
    llama_cpp.quantise(whole, Path(output), kind)
    return 0


def _run(argv: list[str]) -> None:
    print(" ".join(argv[2:]), file=sys.stderr, flush=True)
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    sys.exit(main())
