"""The docker command that runs trtllm-build in the pinned image, the one that serves the engine later."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT, ENGINE, CACHE = Path("/checkpoint"), Path("/engine"), Path("/cache")
_STACK_BYTES = 64 << 20
_PEAK_FILE = ".memory_peak"
#: Leaves the peak of the container's control group beside the engine; the exit code is trtllm-build's.
_SCRIPT = f'"$@"; code=$?; cat /sys/fs/cgroup/memory.peak > {ENGINE}/{_PEAK_FILE} 2>/dev/null; exit $code'


@dataclass(frozen=True)
class Mounts:
    """Folders of this machine under the names that they have in the container."""

    checkpoint: Path
    engine: Path
    cache: Path


def new_name() -> str:
    """A container name that no other build has."""
    return f"minitron-build-{secrets.token_hex(4)}"


def wrap(argv: Sequence[str], image: str, mounts: Mounts, *, name: str, shm_bytes: int) -> list[str]:
    """``argv``, whose paths are those of the container, as a docker command.

    The GPU is passed through; memlock is unlimited and the stack 64 MiB, as NVIDIA's images ask for; the user is the
    one who calls, so that the engine is not root's (HOME and USER are set since the image does not know that user).
    """
    return [
        "docker", "run", "--rm", "--init", "--name", name, "--gpus", "all", "--network", "none",
        "--ulimit", "memlock=-1", "--ulimit", f"stack={_STACK_BYTES}", "--shm-size", str(shm_bytes),
        "--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp", "--env", "USER=minitron",
        "--volume", f"{mounts.checkpoint.absolute()}:{CHECKPOINT}:ro",
        "--volume", f"{mounts.engine.absolute()}:{ENGINE}",
        "--volume", f"{mounts.cache.absolute()}:{CACHE}:ro",
        "--workdir", "/tmp", image, "bash", "-c", _SCRIPT, "build", *argv,
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
