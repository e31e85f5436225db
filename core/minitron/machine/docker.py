"""Docker: whether the one that 'docker' speaks to is here, and what every container of ours is started with.

The containers that build and that serve run under the caller's user id, so that what they write is not root's. The
image's passwd does not have that user: without HOME programs write to /; without USER ``getpass.getuser`` ends in
KeyError, and with it ``import torch`` (torch._inductor asks for the name of its cache folder; vllm-project/vllm#44548).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from minitron.errors import MachineError
from minitron.text import proxy

#: What NVIDIA's images ask for: no limit of locked memory, and a stack of 64 MiB.
ULIMITS: Mapping[str, int] = {"memlock": -1, "stack": 64 << 20}
_UNKNOWN_USER = {"HOME": "/tmp", "USER": "minitron"}


def run_flags(*, name: str, gpus: str, shm_bytes: int, environment: Mapping[str, str]) -> list[str]:
    """Flags of ``docker run``: the container ends with its program, has GPUs, ``shm_bytes`` of /dev/shm and our user.

    ``gpus``: what ``--gpus`` takes. ``environment``: the recipe's, which may say HOME and USER otherwise.
    """
    variables = _UNKNOWN_USER | dict(environment)
    return [
        "--rm", f"--name={name}", f"--gpus={gpus}", f"--shm-size={shm_bytes}",
        *(f"--ulimit={limit}={value}" for limit, value in ULIMITS.items()),
        f"--user={os.getuid()}:{os.getgid()}",
        *(f"--env={variable}={value}" for variable, value in variables.items()),
    ]  # fmt: skip


def check_is_here(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a docker that DOCKER_HOST has on another machine, where our folders, ports and GPUs are not.

    Raises MachineError.
    """
    scheme, _, rest = environment.get("DOCKER_HOST", "").partition("://")
    if scheme in ("tcp", "http", "https", "ssh") and not proxy.is_loopback(urlsplit(f"//{rest}").hostname or ""):
        raise MachineError(
            "DOCKER_HOST in the environment names another machine, and a container there sees no folder of this one: "
            "unset it, or run this there"
        )
