"""Facts about this machine, read from the system without installing anything."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from minitron_trtllm.errors import MachineError
from minitron_trtllm.text import proxy

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit_bytes() -> int:
    """Memory that processes here may use: the machine's, or the control group's where that is less."""
    return min([_meminfo("MemTotal"), *_cgroup_limits()])


def memory_available_bytes() -> int:
    """Memory that could be used now without swapping (MemAvailable of the kernel, within the limit)."""
    return min(_meminfo("MemAvailable"), memory_limit_bytes())


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits() -> list[int]:
    found = []
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return found


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
