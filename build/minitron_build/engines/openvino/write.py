"""Build a CPU engine: a folder with an OpenVINO model that holds the checkpoint's own weights, codes and scales."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.console import Progress
from minitron.errors import CheckpointError
from minitron.machine import cpu_execution, cpu_machines
from minitron.model.shape import ModelShape
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.engines import folder
from minitron_build.plan.limits import CPU_NUM_TOKENS, Limits

log = logging.getLogger(__name__)

TARGET = "cpu"
MODEL_FOLDER = "openvino"
_SMALL_FILES_BYTES = 64 << 20
"""Room for the graph, the norms, the rotary tables and the tokenizer."""


@dataclass(frozen=True)
class CpuOptions:
    """What a user can ask of a CPU engine; a limit of None is derived from the model's shape.

    ``execution``: "exact" computes in float32 what the checkpoint says; "fast" lets the plugin use bfloat16 and 8-bit
    activations and keys/values. ``lm_head``: the output projection "as_is", in "int8", which the checkpoint does not
    hold, or "screened": both, of which a token reads the second and a few rows of the first.
    ``overflow``: "float16" makes infinite what a float16 network could not hold.
    """

    execution: str = "exact"
    lm_head: str = "as_is"
    overflow: str = "none"
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None

    def limits(self, shape: ModelShape) -> Limits:
        """The engine's limits; raises UsageError where they cannot be.

        By default a prompt may be as long as the rotary table reaches, and 16 sequences generate together.
        """
        given = {item.name: value for item in fields(Limits) if (value := getattr(self, item.name)) is not None}
        batch, length = given.get("max_batch_size", 16), given.get("max_seq_len", shape.max_positions)
        derived = {
            "max_batch_size": batch,
            "max_input_len": length,
            "max_seq_len": length,
            "max_num_tokens": max(CPU_NUM_TOKENS, batch),
        }
        return Limits(**derived | given).check(shape.max_positions)


def build(
    checkpoint: Path,
    output: Path,
    options: CpuOptions,
    *,
    force: bool = False,
    tokenizer: Mapping[str, bytes] | None = None,
    more_details: dict[str, Any] | None = None,
) -> manifest.Manifest:
    """Build the engine folder ``output`` from the checkpoint folder and return its manifest.

    The weights are streamed: the memory in use is that of one matrix, whatever the model. ``tokenizer``: files that
    take the place of the checkpoint's. ``more_details`` go into the manifest. Raises CheckpointError for a checkpoint
    that cannot be used, UsageError for limits that cannot be, OutputExists, NoSpace, OutputError.
    """
    from minitron.machine.openvino import VERSION
    from minitron_build.engines.openvino import ir
    from minitron_build.engines.openvino.graph import build_graph
    from minitron_build.engines.openvino.weights import CheckpointWeights

    with Checkpoint.open(checkpoint) as source:
        _check_one_rank(source)
        _check_arithmetic(source)
        limits = options.limits(source.shape)
        made_from = folder.checkpoint_input(checkpoint)
        weights = CheckpointWeights(source, lm_head=options.lm_head)
        proven = options.execution == "exact"
        graph = build_graph(source.shape, weights, overflow=options.overflow, proven=proven)
        weight_bytes = sum(constant.nbytes for constant in weights.constants)
        with files.new_folder(output, force=force, needed_bytes=weight_bytes + _SMALL_FILES_BYTES) as partial:
            with Progress(weight_bytes, "build") as progress:
                written = ir.write(graph, weights.constants, partial / MODEL_FOLDER, progress.advance)
            cpu = {"execution": options.execution, "lm_head": options.lm_head, "overflow": options.overflow}
            how = execution(options.execution, source)
            folder.write_config(partial, VERSION, source, limits, cpu=cpu | {"properties": how["properties"]})
            more = (
                cpu
                | how
                | {
                    "has_tokenizer": folder.copy_tokenizer(checkpoint, partial, tokenizer),
                    "weight_bytes": weight_bytes,
                }
            )
            return manifest.write(
                partial, "engine", made_from, arguments={"target": TARGET} | asdict(options),
                details=folder.details(TARGET, source, limits, **more) | (more_details or {}),
                known_sha256={f"{MODEL_FOLDER}/{name}": sha256 for name, sha256 in written.items()},
            )  # fmt: skip


def execution(how: str, source: Checkpoint) -> dict[str, Any]:
    """``properties`` of the plugin for "exact" or "fast", and ``because``: fast mode is a matter of the machine."""
    if how == "exact":
        kept = (source.config.get("quantization") or {}).get("kv_cache_quant_algo")
        return {"properties": cpu_execution.exact_properties(str(kept or "auto").lower()), "because": "float32"}
    row = cpu_machines.this_machine()
    return {"properties": row.properties, "because": f"{row.machine}: {row.because}"}


def _check_arithmetic(source: Checkpoint) -> None:
    if source.precision.has_eight_bit_activations:
        raise CheckpointError(
            f"{source.folder} is {source.precision.value} ({source.precision.quant_algo(source.spec.group_size)}): its "
            "products are of 8-bit activations, which a CPU engine has not; build it with --target for a GPU, and for "
            "cpu convert the model itself"
        )


def _check_one_rank(source: Checkpoint) -> None:
    if (source.tp, source.pp) != (1, 1):
        raise CheckpointError(
            f"{source.folder} is split for {source.tp} x {source.pp} GPUs (tp x pp), and a CPU engine needs the model "
            "in one piece; convert it with --tp 1 --pp 1"
        )
