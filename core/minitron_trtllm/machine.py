"""The GPUs of this machine, asked of the driver without installing anything."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuHere:
    """A GPU as nvidia-smi reports it."""

    name: str
    memory_bytes: int
    compute_capability: str
    driver: str


def gpus() -> list[GpuHere]:
    """The NVIDIA GPUs of this machine; none where nvidia-smi is missing or fails."""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        told = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines() if line.strip()]
        return [GpuHere(name, int(mebibytes) << 20, capability, driver) for name, mebibytes, capability, driver in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
