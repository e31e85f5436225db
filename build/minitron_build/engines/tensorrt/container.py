"""The docker command that runs trtllm-build in the pinned image, the one that serves the engine later."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron.machine.container_environment import environment
from minitron.recipe_model import Container

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

    The GPU is passed through; memlock is unlimited and the stack 64 MiB, as NVIDIA's images ask for; the user is the
    one who calls, so that what is written is not root's. ``container``: the recipe's section.
    """
    variables = environment(container.environment)
    return [
        "docker", "run", "--rm", "--init", "--name", name, "--gpus", "all", "--network", "none",
        "--ulimit", "memlock=-1", "--ulimit", f"stack={_STACK_BYTES}", "--shm-size", str(container.shm_bytes),
        "--user", f"{os.getuid()}:{os.getgid()}",
        *(word for name, value in variables.items() for word in ("--env", f"{name}={value}")),
        *(word for there, here in volumes.items() for word in ("--volume", f"{here.absolute()}:{there}")),
        "--workdir", "/tmp", image, *argv,
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
