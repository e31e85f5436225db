"""What is in a checkpoint, tensor by tensor, and how far it is from the model it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.errors import CheckpointError
from minitron_build.checkpoint import codes, groups
from minitron_build.checkpoint.plan import PlannedTensor, Rule, plan_rank
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.checkpoint.values import Calculator
from minitron_build.checkpoint.write import blocks
from minitron_build.sources.model import Source
from minitron_build.sources.opening import open_model

Floats = npt.NDArray[np.float32]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of ``rank``: ``dtype`` as safetensors spells it, ``shape`` as stored.

    ``relative_error`` is |stored - source| / |source| (Frobenius norms), of codes x scales where it is quantised; None
    without a source, and for what no source holds (scales, rotary tables).
    """

    rank: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    relative_error: float | None = None


def inspect(folder: Path, model: str | None = None, revision: str | None = None) -> list[StoredTensor]:
    """List all tensors of a checkpoint, compared with ``model`` where one is given.

    Raises CheckpointError, ModelError, UsageError.
    """
    with Checkpoint.open(folder) as checkpoint:
        listed = list(_stored(checkpoint))
        if model is None:
            return listed
        source = open_model(model, revision)
        try:
            return _compared(checkpoint, source, listed)
        finally:
            source.close()


def about(folder: Path) -> dict[str, Any]:
    """What a checkpoint is, as JSON values; raises CheckpointError."""
    with Checkpoint.open(folder) as checkpoint:
        spec = checkpoint.spec
        return {
            "precision": spec.precision.value, "quant_algo": spec.precision.quant_algo(spec.group_size),
            "group_size": spec.group_size, "kv_cache": spec.kv_cache, "dtype": spec.dtype, "tp": spec.tp, "pp": spec.pp,
            "producer": checkpoint.config.get("producer"),
        }  # fmt: skip


def _stored(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    for rank in range(checkpoint.spec.world_size):
        for name in checkpoint.names(rank):
            entry = checkpoint.entry(name, rank)
            yield StoredTensor(rank, name, entry.dtype, entry.shape, entry.nbytes)


def _compared(checkpoint: Checkpoint, source: Source, listed: list[StoredTensor]) -> list[StoredTensor]:
    spec, shape = checkpoint.spec, source.shape()
    if replace(shape, dtype=None, tied_embeddings=False) != replace(spec.shape, dtype=None):
        raise CheckpointError(f"{checkpoint.folder} is not a checkpoint of {source.path}: their sizes differ")
    calculator = Calculator(spec, source.tensors(), _FLOAT32)
    plans = [{planned.name: planned for planned in plan_rank(spec, rank)} for rank in range(spec.world_size)]
    return [
        replace(stored, relative_error=_error(checkpoint, calculator, plans[stored.rank][stored.name], stored.rank))
        for stored in listed
    ]


def _error(checkpoint: Checkpoint, calculator: Calculator, planned: PlannedTensor, rank: int) -> float | None:
    if planned.rule not in (Rule.CAST, Rule.NORM, Rule.CODES, Rule.GROUP_CODES):
        return None
    difference = size = 0.0
    for block in blocks(planned):
        wanted = calculator.rows(planned, block.start, block.stop)
        if planned.rule is Rule.NORM:
            wanted = wanted + np.float32(1)
        found = _stored_rows(checkpoint, planned, block.start, block.stop, rank)
        difference += float(np.sum(np.square(found - wanted), dtype=np.float64))
        size += float(np.sum(np.square(wanted), dtype=np.float64))
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def _stored_rows(checkpoint: Checkpoint, planned: PlannedTensor, start: int, stop: int, rank: int) -> Floats:
    """Rows (output channels) as the engine will see them."""
    if planned.rule is Rule.GROUP_CODES:
        return _grouped_rows(checkpoint, planned.name.removesuffix(".weight"), start, stop, rank)
    if planned.rule is not Rule.CODES:
        return checkpoint.rows(planned.name, start, stop, rank).astype(np.float32)
    scales = planned.name.removesuffix("weight") + "per_channel_scale"
    return codes.dequantize(
        checkpoint.codes(planned.name, start, stop, rank), checkpoint.rows(scales, start, stop, rank)
    )


def _grouped_rows(checkpoint: Checkpoint, name: str, start: int, stop: int, rank: int) -> Floats:
    """Codes x scales x what the inputs are multiplied with."""
    scales = checkpoint.rows(f"{name}.weights_scaling_factor", start, stop, rank)
    rows = groups.dequantize(checkpoint.codes(f"{name}.weight", start, stop, rank), scales)
    factors = checkpoint.factors(name, rank)
    return rows if factors is None else rows * factors
