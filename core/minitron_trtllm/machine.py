"""The GPUs of this machine, and where its docker is: asked of the system without installing anything."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from minitron_trtllm.errors import MachineError
from minitron_trtllm.text import proxy


def check_docker_is_here(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a docker that DOCKER_HOST has on another machine, where our folders, ports and GPUs are not.

    Raises MachineError.
    """
    scheme, _, rest = environment.get("DOCKER_HOST", "").partition("://")
    if scheme in ("tcp", "http", "https", "ssh") and not proxy.is_loopback(urlsplit(f"//{rest}").hostname or ""):
        raise MachineError(
            "DOCKER_HOST in the environment names another machine, and a container there sees no folder of this one: "
            "unset it, or run this there"
        )


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
