"""GPUs that can be a target: their memory, bandwidth and arithmetic, read from data/gpus.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_trtllm import data_files
from minitron_trtllm.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. ``memory_bytes`` as CUDA reports them; ``bandwidth`` in bytes/s, ``dense_flops`` in FLOP/s."""

    target: str
    name: str
    compute_capability: str
    memory_bytes: int
    bandwidth: float
    dense_flops: float
    source: str

    @property
    def architecture(self) -> str:
        """The name of the architecture that an engine is built for: ``sm80``."""
        return "sm" + self.compute_capability.replace(".", "")


def all_gpus() -> list[Gpu]:
    """Every GPU of data/gpus.yaml."""
    return [Gpu(target=target, **entry) for target, entry in data_files.load("gpus.yaml").items()]


def find(target: str) -> Gpu:
    """The GPU of a target; raises UsageError, naming those there are."""
    known = {gpu.target: gpu for gpu in all_gpus()}
    if target not in known:
        raise UsageError(f"target {target!r} is not known; it may be cpu, {', '.join(known)}")
    return known[target]
