"""Runs beside TensorRT-LLM, where the toolkit is not installed: asks it, and writes down what it answers.

    python3 inside.py tool FLAGS OUTPUT               versions, the help of trtllm-build, and whether it takes our flags
    python3 inside.py load CHECKPOINT OUTPUT          the config as TensorRT-LLM reads it; every rank loaded
    python3 inside.py quantise WEIGHTS OUTPUT         its own codes and scales of the matrices in WEIGHTS

OUTPUT is a folder; answers are JSON and raw bytes in it, judged by whoever asked. Only the standard library, torch and
tensorrt_llm are imported. Calls as trtllm-build (tensorrt_llm/commands/build.py, 65f1d153) and the converters
(tensorrt_llm/models/convert_utils.py, weight_only_quantize) make them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Wide enough that argparse breaks no line of the help.
_COLUMNS = "100000"


def tool(flags: Path, output: Path) -> None:
    """versions.json and help.txt; command.json: what trtllm-build says to the words of flags.json and --help.

    argparse looks at every value before it comes to --help, which ends it: nothing is built.
    """
    import tensorrt_llm
    import torch

    versions = {
        "tensorrt_llm": tensorrt_llm.__version__,
        "tensorrt": importlib.metadata.version("tensorrt"),
        "cuda": os.environ.get("CUDA_VERSION") or torch.version.cuda,
        "server": os.environ.get("TRITON_SERVER_VERSION"),
    }
    (output / "versions.json").write_text(json.dumps(versions))
    told = subprocess.run(
        ["trtllm-build", "--help"],
        env=os.environ | {"COLUMNS": _COLUMNS},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (output / "help.txt").write_text(told.stdout)
    words: list[str] = json.loads((flags / "flags.json").read_text())
    told = subprocess.run([*words, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    said = [line for line in told.stderr.splitlines() if line.strip()]
    (output / "command.json").write_text(json.dumps({"code": told.returncode, "said": said[-1] if said else ""}))


def load(checkpoint: Path, output: Path) -> None:
    """config.json as read back; then loaded.json with how many ranks were loaded."""
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    config = PretrainedConfig.from_json_file(str(checkpoint / "config.json"))
    (output / "config.json").write_text(json.dumps(config.to_dict(), default=str, indent=1))
    ranks = config.mapping.world_size
    for rank in range(ranks):
        of_rank = copy.deepcopy(config)
        of_rank.set_rank(rank)
        MODEL_MAP[config.architecture].from_checkpoint(str(checkpoint), config=of_rank)
    (output / "loaded.json").write_text(json.dumps({"ranks": ranks}))


def quantise(weights: Path, output: Path) -> None:
    """For each matrix NAME of weights.json: NAME.codes and NAME.scales, as bytes."""
    import tensorrt_llm  # noqa: F401 - brings the operation
    import torch

    asked: dict[str, Any] = json.loads((weights / "weights.json").read_text())
    dtype = getattr(torch, asked["dtype"])
    kind = {8: torch.int8, 4: torch.quint4x2}[asked["bits"]]
    for name, (rows, columns) in asked["matrices"].items():
        raw = bytearray((weights / name).read_bytes())
        matrix = torch.frombuffer(raw, dtype=dtype).reshape(rows, columns)
        # It takes [in, out] on the CPU, and lays the codes out for the GPU of this machine.
        codes, scales = torch.ops.trtllm.symmetric_quantize_last_axis_of_batched_matrix(matrix.t().contiguous(), kind)
        (output / f"{name}.codes").write_bytes(_bytes(codes, torch))
        (output / f"{name}.scales").write_bytes(_bytes(scales, torch))


def _bytes(tensor: Any, torch: Any) -> bytes:
    return bytes(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def main() -> None:
    """Run what was asked for."""
    what, *folders = sys.argv[1:]
    work: dict[str, Callable[..., None]] = {"tool": tool, "load": load, "quantise": quantise}
    work[what](*map(Path, folders))


if __name__ == "__main__":
    main()
