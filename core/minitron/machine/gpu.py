"""GPUs that can be a target: their memory, bandwidth and arithmetic, read from data/gpus.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minitron import data_files
from minitron.errors import UsageError

_MEMORY_SLICES = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. ``memory_bytes`` as CUDA reports them; ``bandwidth`` in bytes/s, ``dense_flops`` in FLOP/s."""

    target: str
    name: str
    compute_capability: str
    memory_bytes: int
    bandwidth: float
    dense_flops: float
    multiprocessors: int
    source: str

    @property
    def architecture(self) -> str:
        """The name of the architecture that an engine is built for: ``sm80``."""
        return architecture_of(self.compute_capability)

    @property
    def has_fp8(self) -> bool:
        """Whether it calculates in FP8: compute capability 8.9 (Ada) and higher."""
        major, minor = self.compute_capability.split(".")
        return (int(major), int(minor)) >= (8, 9)

    @property
    def code_layout(self) -> str:
        """Which layout of weight-only codes its mixed GEMMs read, by the first architecture that has it.

        ``sm80`` is what ``convert`` writes; codes for others are made by trtllm-build on the GPU itself. Source:
        cutlass_preprocessors.cpp (NVIDIA/TensorRT-LLM b35ac1b6): sm75 to sm89 share one, sm90 has another.
        """
        return "sm80" if "7.5" <= self.compute_capability <= "8.9" else self.architecture


def architecture_of(compute_capability: str) -> str:
    """What engines call a compute capability: "8.0" is "sm80"."""
    return "sm" + compute_capability.replace(".", "")


def all_gpus() -> list[Gpu]:
    """Every GPU of data/gpus.yaml, undivided."""
    return [Gpu(target=target, **_board(entry)) for target, entry in data_files.load("gpus.yaml").items()]


def slices() -> list[Gpu]:
    """Every MIG profile of data/gpus.yaml as a GPU of its own: its memory, its share of bandwidth and arithmetic."""
    found = []
    for board in all_gpus():
        for profile, part in data_files.load("gpus.yaml")[board.target].get("mig", {}).items():
            found.append(replace(
                board,
                target=f"{board.target}-{profile}",
                name=f"{board.name}, MIG {profile}",
                memory_bytes=int(part["gib"] * (1 << 30)),
                bandwidth=board.bandwidth * part["memory_slices"] / _MEMORY_SLICES,
                dense_flops=board.dense_flops * part["multiprocessors"] / board.multiprocessors,
                multiprocessors=part["multiprocessors"],
            ))  # fmt: skip
    return found


def _board(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "mig"}


def find(target: str) -> Gpu:
    """The GPU or the MIG slice of a target; raises UsageError, naming those there are."""
    known = {gpu.target: gpu for gpu in [*all_gpus(), *slices()]}
    if target not in known:
        raise UsageError(f"target {target!r} is not known; it may be cpu, {', '.join(known)}")
    return known[target]
