"""The server against the bare OpenVINO pipeline and llama.cpp: the same prompts, in alternating rounds.

A token of a dense model reads every weight once, so that one stream is bound by memory bandwidth, and a prompt by
arithmetic. What a server may add is small against both, and this shows how small: "server" is the way of a client's
text through Triton's gRPC, the BLS front, the CPU engine's model and back as text; "bare" is a loop around
``openvino_genai.ContinuousBatchingPipeline`` with the same engine and settings in a process of its own; "llama.cpp"
is its server with the same weights as Q8_0 beside int8 and Q4_0 beside int4, and none beside 16 bits
(``llama_cpp_side``). All are loaded at the same time and measured in turns; half way they are loaded anew in the
opposite order, because who is loaded first may get the better memory.

    python benches/bench_cpu.py                                        # a random 1B model
    python benches/bench_cpu.py --shape 4b --executions exact fast     # the full Minitron-4B shape, random weights
    python benches/bench_cpu.py --shape 4b --resume --precisions int8_weight_only   # a piece of it, added to the rest

tokens/s is output tokens by the wall clock from the first request to the last token, prompts included; TTFT is that of
one prompt of ``--prompt-tokens``; the streams have prompts of ``--stream-prompt-tokens``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import cpu_sides
import llama_cpp_side

from minitron import console
from minitron.model.precision import ROUNDED

ROOT = Path(__file__).parent.parent
_PAIRS = (("server", "bare"), ("server", "llama.cpp"), ("bare", "llama.cpp"))
SHAPES = {"1b": "1b", "4b": "minitron-4b"}
_WORDS = (
    "river",
    "stone",
    "light",
    "house",
    "morning",
    "water",
    "garden",
    "winter",
    "letter",
    "road",
    "voice",
    "table",
)


def main() -> int:
    """Measure, print a table, write JSON."""
    args = _arguments()
    rows = _kept_rows(args) if args.resume else []
    for precision in args.precisions:
        for execution in args.executions:
            if any((row["precision"], row["execution"]) == (precision, execution) for row in rows):
                continue
            rows.append(_measure(args, precision, execution))
            _write(args, rows)
            print(_table(args, rows[-1:]), flush=True)
    print("\n" + _table(args, rows))
    print(f"\nwritten to {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1b", help="random model of this shape, made once")
    add("--model", type=Path, help="a Hugging Face folder instead")
    add("--precisions", nargs="+", choices=[kind.value for kind in ROUNDED],
        default=["bfloat16", "int8_weight_only", "int4_weight_only"])  # fmt: skip
    add("--executions", nargs="+", choices=("exact", "fast"), default=["exact"])
    add("--streams", nargs="+", type=int, default=[1, 4])
    add("--prompt-tokens", type=int, default=512, help="of the request that TTFT is measured with")
    add("--stream-prompt-tokens", type=int, default=32)
    add("--output-tokens", type=int, default=64, help="of each stream")
    add("--rounds", type=int, default=5)
    add("--work", type=Path, default=ROOT / "out" / "bench-cpu", help="where models, engines and figures go")
    add("--no-peer", action="store_true", help="leave llama.cpp out")
    add("--resume", action="store_true", help="keep the rows that the JSON file has, and measure those it lacks")
    add("--json", type=Path, help="default: WORK/bench-cpu-SHAPE.json")
    args = parser.parse_args()
    args.json = args.json or args.work / f"bench-cpu-{args.model.name if args.model else args.shape}.json"
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def _measure(args: argparse.Namespace, precision: str, execution: str) -> dict[str, Any]:
    """Everything about one engine."""
    model = args.model or _random_model(args)
    checkpoint, engine, repository = (args.work / f"{model.name}-{precision}{end}" for end in ("", "-engine", "-repo"))
    if not checkpoint.exists():
        _minitron("convert", model, "--output", checkpoint, "--precision", precision)
    longest: int = max(args.prompt_tokens, args.stream_prompt_tokens) + args.output_tokens
    built = _minitron(
        "build", checkpoint, "--target", "cpu", "--output", engine, "--force", "--json", "--execution", execution,
        "--max-batch-size", max(args.streams), "--max-seq-len", longest, "--max-input-len", longest,
    )  # fmt: skip
    shutil.rmtree(repository, ignore_errors=True)
    _minitron("render", engine, "--output", repository, "--max-tokens-in-paged-kv-cache", _kv_tokens(args))
    kind = None if args.no_peer else llama_cpp_side.KINDS.get(precision)
    peer = llama_cpp_side.gguf(model, kind, args.work) if kind else None
    load_average = os.getloadavg()
    slots = max(args.streams)
    sides: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: cpu_sides.bare(engine, _kv_tokens(args)),
        lambda: cpu_sides.server(repository, args.work),
    ]
    if peer:
        sides.append(lambda: llama_cpp_side.llama_cpp(peer, model, slots, longest, args.work))
    rounds: list[dict[str, Any]] = []
    load: dict[str, float] = {}  # this and memory: of the first half
    memory: dict[str, dict[str, int]] = {}
    middle = -(-args.rounds // 2)
    for numbers, order in ((range(middle), 1), (range(middle, args.rounds), -1)):
        if not numbers:
            continue
        with ExitStack() as stack:
            loaded = [stack.enter_context(side()) for side in sides[::order]]
            rounds += [_round(args, number, *loaded[:: -1 if number % 2 else 1]) for number in numbers]
            load = load or {side.name: side.load_s for side in loaded}
            memory = memory or {side.name: side.memory() for side in loaded}
    shutil.rmtree(repository)
    shutil.rmtree(engine)
    return {
        "precision": precision,
        "execution": execution,
        "llama_cpp_kind": kind,
        "load_average": load_average,
        "build": {key: built[key] for key in ("seconds", "peak_memory_bytes", "bytes")},
        "load_s": load,
        "memory_bytes": memory,
        **_medians(rounds),
        "rounds": rounds,
    }


def _round(args: argparse.Namespace, number: int, *sides: Any) -> dict[str, Any]:
    """Each side measured once, in this order."""
    found: dict[str, Any] = {}
    for side in sides:
        figures: dict[str, Any] = {}
        prompts = _prompts(args, f"{number} a", 1, args.prompt_tokens)
        figures["ttft_s"] = side.ask(prompts, 1)["ttft_s"]
        for streams in args.streams:
            prompts = _prompts(args, f"{number} {streams}", streams, args.stream_prompt_tokens)
            done = side.ask(prompts, args.output_tokens)
            assert done["tokens"] == streams * args.output_tokens, done
            figures[f"tokens_per_s_{streams}"] = done["tokens"] / done["seconds"]
        found[side.name] = figures
    print(f"round {number + 1}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of each figure and, for each pair of sides, the median of its ratio in each round."""
    names = sorted(rounds[0])
    sides = {
        side: {key: statistics.median(found[side][key] for found in rounds) for key in rounds[0][side]}
        for side in names
    }
    ratios = {
        f"{one} : {other}": {
            key: statistics.median(found[one][key] / found[other][key] for found in rounds) for key in rounds[0][one]
        }
        for one, other in _PAIRS
        if one in names and other in names
    }
    return sides | {"ratios": ratios}


def _random_model(args: argparse.Namespace) -> Path:
    model: Path = args.work / f"random-{args.shape}"
    if not model.exists():
        _run([sys.executable, ROOT / "models" / "random_model.py", "--shape", SHAPES[args.shape], "--output", model])
    return model


def _prompts(args: argparse.Namespace, mark: str, count: int, tokens: int) -> list[str]:
    """Texts of exactly ``tokens`` tokens, each beginning in its own way, so that no cached beginning is met again."""
    from tokenizers import Tokenizer

    folder = args.model or args.work / f"random-{args.shape}"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = []
    for number in range(count):
        text = f"{mark} {number}"
        while (length := len(tokenizer.encode(text, add_special_tokens=False).ids)) < tokens:
            text += f" {_WORDS[length % len(_WORDS)]}" if tokens - length > 12 else "."
        texts.append(text)
    return texts


def _kv_tokens(args: argparse.Namespace) -> int:
    """KV cache for all streams at once, and for as much again that earlier rounds left behind."""
    longest: int = max(args.prompt_tokens, args.stream_prompt_tokens) + args.output_tokens
    streams: int = max(args.streams)
    return 2 * streams * (longest // 32 + 2) * 32


def _table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    streams = [f"tokens_per_s_{count}" for count in args.streams]
    head = ["engine", "", "load s", f"TTFT {args.prompt_tokens} s", *(f"tok/s {count}" for count in args.streams)]
    lines = []
    for row in rows:
        name = f"{row['precision']} {row['execution']}"
        for side in row["load_s"]:
            figures, memory = row[side], row["memory_bytes"][side]
            rates = [f"{figures[key]:.1f}" for key in streams]
            lines.append([name, side, f"{row['load_s'][side]:.1f}", f"{figures['ttft_s']:.2f}", *rates,
                          console.human_bytes(memory["peak"]), console.human_bytes(memory["private"])])  # fmt: skip
        for pair, kept in row["ratios"].items():
            lines.append([name, pair, "", f"{kept['ttft_s']:.2f}", *(f"{kept[key]:.3f}" for key in streams), "", ""])
        built = row["build"]
        lines.append([name, "build", f"{built['seconds']:.1f}", "", *("" for _ in streams),
                      console.human_bytes(built["peak_memory_bytes"]), ""])  # fmt: skip
    return console.table(lines, [*head, "peak memory", "private"])


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    report = {"machine": _machine(not args.no_peer), **_settings(args), "rows": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _kept_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that earlier runs with the same settings wrote."""
    if not args.json.exists():
        return []
    report = json.loads(args.json.read_text(encoding="utf-8"))
    for key, value in _settings(args).items():
        if report.get(key) != value:
            sys.exit(f"{args.json} has {key} {report.get(key)}, not {value}: give another --json, or no --resume")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a report have in common."""
    return {
        "model": str(args.model.name if args.model else f"random weights, shape {SHAPES[args.shape]}"),
        "prompt_tokens": args.prompt_tokens,
        "stream_prompt_tokens": args.stream_prompt_tokens,
        "output_tokens": args.output_tokens,
        "streams": args.streams,
        "rounds": args.rounds,
        "peer": not args.no_peer,
    }


def _machine(peer: bool) -> dict[str, Any]:
    import importlib.metadata
    import platform

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ["openvino", "openvino-genai", "nvidia-pytriton", "tritonclient", "numpy"]
    packages += ["xllamacpp"] if peer else []
    return {
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def _minitron(*words: object) -> Any:
    """Run a command; its JSON document where it prints one."""
    done = _run([sys.executable, "-m", "minitron_cli", *words])
    return json.loads(done) if "--json" in words else None


def _run(words: list[Any]) -> str:
    return subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
