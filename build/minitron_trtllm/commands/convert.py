"""``minitron convert``: a model into a TensorRT-LLM checkpoint."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from minitron_trtllm import memory, output
from minitron_trtllm.precision import DTYPES, Precision


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="model folder, GGUF file, or a Hugging Face id (owner/name)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--precision", default="auto", choices=["auto", *(kind.value for kind in Precision)],
                        help="how linear weights are stored (default: auto, as in the model)")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="what everything else is stored in, for the weight-only precisions")  # fmt: skip
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallel ranks (default: 1)")
    parser.add_argument("--use-parallel-embedding", action="store_true", help="split the embedding over tp ranks")
    parser.add_argument("--embedding-sharding-dim", type=int, default=0, choices=[0, 1],
                        help="split it by vocabulary (0, default) or by hidden size (1)")  # fmt: skip
    parser.add_argument("--quantize-at-build", action="store_true",
                        help="leave floats for trtllm-build to quantise, on a GPU of any family")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer, instead of the model's own")
    parser.add_argument("--force", action="store_true", help="replace an existing output, once the new one is complete")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came of it."""
    from minitron_trtllm.checkpoint.convert import convert

    options = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    done = convert(args.model, args.output, **options)
    details = done.manifest.details
    summary: dict[str, Any] = {
        "output": str(done.folder),
        "digest": done.manifest.digest,
        "precision": details["precision"],
        "dtype": details["dtype"],
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
    if args.json:
        output.emit_json(summary)
    else:
        print(output.table([[key, _cell(key, value)] for key, value in summary.items()], ["", ""]))
    return 0


_OPTIONS = ("revision", "precision", "dtype", "tp", "pp", "use_parallel_embedding", "embedding_sharding_dim",
            "quantize_at_build", "tokenizer", "force")  # fmt: skip


def _cell(key: str, value: Any) -> Any:
    if key == "source_types":
        return ", ".join(f"{kind} x {count}" for kind, count in value.items())
    if key == "lost_before":
        return "; ".join(value)
    return output.human_bytes(value) if key.endswith("_bytes") else value
