"""Where the docker is that 'docker' speaks to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from minitron.errors import MachineError
from minitron.text import proxy


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
