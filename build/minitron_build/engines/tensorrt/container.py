"""The docker command that runs trtllm-build in the pinned image, the one that serves the engine later."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron.machine import docker
from minitron.recipe_model import Container

CHECKPOINT, ENGINE, CACHE = Path("/checkpoint"), Path("/engine"), Path("/cache")
_PEAK_FILE = ".memory_peak"
#: Leaves the peak of the container's control group beside the engine; the exit code is trtllm-build's.
_SCRIPT = f'"$@"; code=$?; cat /sys/fs/cgroup/memory.peak > {ENGINE}/{_PEAK_FILE} 2>/dev/null; exit $code'


@dataclass(frozen=True)
class Mounts:
    """Folders of this machine under the names that they have in the container."""

    checkpoint: Path
    engine: Path
    cache: Path


def new_name(work: str = "build") -> str:
    """A container name that nothing else has."""
    return f"minitron-{work}-{secrets.token_hex(4)}"


def wrap(argv: Sequence[str], image: str, mounts: Mounts, *, name: str, container: Container) -> list[str]:
    """trtllm-build's ``argv``, whose paths are those of the container, as a docker command."""
    volumes = {f"{CHECKPOINT}:ro": mounts.checkpoint, str(ENGINE): mounts.engine, f"{CACHE}:ro": mounts.cache}
    return command(["bash", "-c", _SCRIPT, "build", *argv], image, volumes, name=name, container=container)


def command(
    argv: Sequence[str], image: str, volumes: Mapping[str, Path], *, name: str, container: Container
) -> list[str]:
    """``docker run`` of ``argv``; ``volumes``: place in the container (``:ro`` where it is only read) → folder here.

    ``container``: the recipe's section.
    """
    ours = docker.run_flags(name=name, gpus="all", shm_bytes=container.shm_bytes, environment=container.environment)
    return [
        "docker", "run", *ours, "--init", "--network=none",
        *(f"--volume={here.absolute()}:{there}" for there, here in volumes.items()),
        "--workdir=/tmp", image, *argv,
    ]  # fmt: skip


def stop(name: str) -> None:
    """End the container, if it runs; docker's client may be gone before it."""
    subprocess.run(["docker", "kill", name], capture_output=True, check=False)


def take_peak_bytes(engine: Path) -> int | None:
    """Read and remove what the script left about memory; None where the kernel does not count it."""
    file = engine / _PEAK_FILE
    if not file.exists():
        return None
    text = file.read_text(encoding="ascii").strip()
    file.unlink()
    return int(text) if text.isdigit() else None
