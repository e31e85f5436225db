"""``minitron convert``: a model into a TensorRT-LLM checkpoint."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from minitron import console, recipe
from minitron.errors import UsageError
from minitron.machine import gpu, memory
from minitron.model import activations
from minitron.model.precision import Precision
from minitron.recipe_model import Recipe

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?",
                        help="model folder, GGUF file, or a Hugging Face id (default: the recipe's)")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the checkpoint")
    recipe.add_flags(
        parser, "model.revision", "model.activations", "precision", "dtype", "target", "tensor_parallel",
        "pipeline_parallel", "use_parallel_embedding", "embedding_sharding_dim", "group_size", "kv_cache",
        "calibration.text", "calibration.sequences", "calibration.tokens",
    )  # fmt: skip
    parser.add_argument("--quantize-at-build", action="store_true",
                        help="leave floats for trtllm-build to quantise, on a GPU of any family")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer, instead of the model's own")
    parser.add_argument("--force", action="store_true", help="replace an existing output, once the new one is complete")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came of it."""
    from minitron_build.checkpoint.calibration.text import CalibrationText
    from minitron_build.checkpoint.convert import convert

    effective = recipe.from_args(args)
    wanted = effective.recipe
    asked = wanted.calibration
    if effective.name == "defaults" and effective.origins["model.source"] == "default":
        raise UsageError("say which MODEL to convert, or a --recipe that does")
    measured = activations.read(wanted.model.activations) if wanted.model.activations else None
    done = convert(
        wanted.model.source,
        args.output,
        revision=wanted.model.revision,
        precision=wanted.precision,
        dtype=wanted.dtype,
        tp=wanted.tensor_parallel,
        pp=wanted.pipeline_parallel,
        use_parallel_embedding=wanted.use_parallel_embedding,
        embedding_sharding_dim=wanted.embedding_sharding_dim,
        quantize_at_build=args.quantize_at_build or _left_to_build(wanted),
        group_size=wanted.group_size,
        kv_cache=wanted.kv_cache,
        calibration=CalibrationText(Path(asked.text), asked.sequences, asked.tokens) if asked.text else None,
        tokenizer=args.tokenizer,
        measured=measured,
        force=args.force,
    )
    details = done.manifest.details
    for warning in activations.warnings(details["dtype"], measured):
        log.warning("%s", warning)
    summary: dict[str, Any] = {
        "output": str(done.folder),
        "digest": done.manifest.digest,
        "precision": details["precision"],
        "dtype": details["dtype"],
        "group_size": details["group_size"],
        "kv_cache": details["kv_cache"],
        "tp": details["tp"],
        "pp": details["pp"],
        "has_tokenizer": details["has_tokenizer"],
        "tensors": done.tensors,
        "source_bytes": done.source_bytes,
        "checkpoint_bytes": done.checkpoint_bytes,
        "seconds": round(done.seconds, 3),
        "peak_memory_bytes": memory.peak_bytes(),
    }
    if "source_types" in details:
        summary["source_types"] = dict(Counter(details["source_types"].values()).most_common())
        summary["lost_before"] = details["lost_before"]
    if "remarks" in details:
        summary["remarks"] = details["remarks"]
    if args.json:
        console.emit_json(summary)
    else:
        print(console.table([[key, _cell(key, value)] for key, value in summary.items()], ["", ""]))
    return 0


def _left_to_build(wanted: Recipe) -> bool:
    """Whether the recipe's GPU reads codes in another layout than the one that is written here."""
    if wanted.target == "cpu" or wanted.precision == "auto" or wanted.group_size:
        return False
    if not Precision(wanted.precision).has_channel_scales:
        return False
    target = gpu.find(wanted.target)
    if target.code_layout == "sm80":
        return False
    log.info("%s is %s, which has a layout of codes of its own: trtllm-build quantises there", target.target,
             target.architecture)  # fmt: skip
    return True


def _cell(key: str, value: Any) -> Any:
    if key == "source_types":
        return ", ".join(f"{kind} x {count}" for kind, count in value.items())
    if key in ("lost_before", "remarks"):
        return "; ".join(value)
    return console.human_bytes(value) if key.endswith("_bytes") else value
