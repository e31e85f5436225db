"""Triton with TensorRT-LLM in its pinned container, for a repository with a GPU engine.

``docker run`` is the supervisor's child here: it hands SIGTERM on to the container's first process, which is
tritonserver itself (the image's entrypoint ends in ``exec``), and its exit code is that one's.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.artifacts import manifest
from minitron.console import human_bytes
from minitron.errors import MachineError, MissingDependency, RepositoryError, UsageError
from minitron.machine import docker, gpus_here
from minitron.machine.gpu import architecture_of
from minitron.machine.gpus_here import GpuHere
from minitron_triton.repository.options import IMAGE
from minitron_triton.server.flags import flags
from minitron_triton.server.launch import (
    GRACE_S,
    MARK_VARIABLE,
    RESTARTS_VARIABLE,
    Launch,
    Options,
    Ports,
    Served,
    loopback,
)
from minitron_triton.server.tls import Tls
from minitron_triton.server.traces import VARIABLES

_ALL = "0.0.0.0"
_INSIDE = Ports()
_COMPOSED_EXIT_TIMEOUT_S = 60
_UNLOAD_S = 10  # of the grace, for Triton's own end: docker compose knows no other
_DOCKER_S = 5  # of the grace, for docker itself
_TLS_FOLDER = Path("/run/minitron-tls")
_KEY_FILE = Path("/run/minitron-api-key")


def check_machine(served: Served) -> None:
    """Raises MissingDependency where there is no docker, MachineError where it is elsewhere, RepositoryError for a
    folder that it cannot mount.

    And, where nvidia-smi shows GPUs here, UsageError for an engine of another kind and MachineError where none has its
    memory: both end in an error while loading otherwise.
    """
    if shutil.which("docker") is None:
        raise MissingDependency(
            "docker is not on PATH, and a GPU engine is served in NVIDIA's container; install Docker with the NVIDIA "
            "container toolkit, or see the command with --dry-run"
        )
    docker.check_is_here()
    if ":" in str(served.folder):
        raise RepositoryError(f"{served.folder} cannot be mounted into a container: its path holds a colon; move it")
    _check_gpus(served)


def _check_gpus(served: Served) -> None:
    here = gpus_here.gpus()
    if not here or served.backend != "tensorrtllm":
        return
    details = manifest.read(served.engine, "engine").details
    architecture, where = details.get("architecture"), str(served.engine)
    fitting = [gpu for gpu in here if architecture in (None, architecture_of(gpu.compute_capability))]
    if not fitting:
        raise UsageError(
            f"{where} was built for {architecture}, and here {_shown(here)}: it would not load; build it again with "
            "this GPU's target"
        )
    memory = (details.get("plan") or {}).get("memory") or {}
    needed = sum(memory.get(part, 0) for part in ("weight_bytes", "activation_bytes", "runtime_bytes"))
    if max(gpu.memory_bytes for gpu in fitting) < needed:
        raise MachineError(
            f"{where} needs {human_bytes(needed)} before its KV cache, and here {_shown(fitting)}; with MIG build for "
            "the slice's own target, or turn MIG off"
        )


def _shown(here: list[GpuHere]) -> str:
    return "is " + ", ".join(f"{gpu.shown} with {human_bytes(gpu.memory_bytes)}" for gpu in here)


def launch(served: Served, options: Options, ports: Ports, runtime: Path, mark: str) -> Launch:
    """``docker run`` as a child process of this machine; it needs no ``runtime`` folder."""
    argv = ["docker", "run", *_docker_flags(served, options, ports, mark), served.image or IMAGE]
    argv += command(served, _inside(options), mark)
    return Launch(mark, tuple(argv), dict(os.environ) | {MARK_VARIABLE: mark}, _name(mark), options.secrets)


def _docker_flags(served: Served, options: Options, ports: Ports, mark: str) -> list[str]:
    inside = _inside(options)
    calls = loopback(f"127.0.0.1:{_INSIDE.grpc}", inside.tls, inside.api_key_file)
    ours = docker.run_flags(
        name=_name(mark), gpus=options.gpus, shm_bytes=served.shm_bytes, environment=options.environment
    )
    return [
        *ours, f"--env={MARK_VARIABLE}={mark}",
        *(f"--env={name}" for name in VARIABLES if options.traces and name in os.environ),  # values may be secret
        f"--env={RESTARTS_VARIABLE}", *(f"--env={name}={value}" for name, value in calls.items()),
        f"--stop-timeout={options.exit_timeout_s + GRACE_S}",
        f"--publish={options.host}:{ports.grpc}:{_INSIDE.grpc}",
        f"--publish={options.http_host}:{ports.http}:{_INSIDE.http}",
        f"--publish={options.metrics_bind}:{ports.metrics}:{_INSIDE.metrics}",
        f"--volume={served.folder}:{served.root}:ro",
        *(f"--volume={outside}:{path}:ro" for path, outside in sorted(_mounted(options, inside).items())),
    ]  # fmt: skip


def _mounted(options: Options, inside: Options) -> dict[Path, Path]:
    """Files outside by where the container sees them."""
    files = {inside.api_key_file: options.api_key_file}
    if options.tls and inside.tls:
        files |= {inside.tls.files[field]: path for field, path in options.tls.files.items()}
    return {path: outside for path, outside in files.items() if path and outside}


def command(served: Served, options: Options, mark: str) -> list[str]:
    """What runs inside: tritonserver, or under mpirun one per rank, the first of which answers.

    Ranks as in TensorRT-LLM's launch_triton_server.py (leader mode, 1.2.0): one block per rank, joined by colons.
    llmapi starts its own workers.
    """
    ranks = 1 if served.backend == "llmapi" else served.world_size
    servers = [
        [
            "tritonserver",
            *flags(served, options, repository=str(served.root), ports=_INSIDE, mark=mark, bind_http=_ALL, rank=rank),
        ]
        for rank in range(ranks)
    ]
    if ranks == 1:
        return servers[0]
    words = ["mpirun", "--allow-run-as-root"]
    for rank, server in enumerate(servers):
        words += [*([":"] if rank else []), "-n", "1", *server]
    return words


def composed(served: Served) -> dict[str, Any]:
    """What a compose file says of the container; it is written once for all starts, and so holds no key."""
    options = Options(exit_timeout_s=_COMPOSED_EXIT_TIMEOUT_S, server_key="")
    grace_s = options.exit_timeout_s + _UNLOAD_S + _DOCKER_S
    inside = command(served, _inside(options), "compose")
    return {"command": inside, "ports": _INSIDE, "ulimits": docker.ULIMITS, "grace_s": grace_s}


def _inside(options: Options) -> Options:
    """The same options as the server in the container sees them: it listens everywhere, Docker publishes less."""
    key_file = _KEY_FILE if options.api_key_file else None
    return replace(options, host=_ALL, tls=_tls_inside(options.tls) if options.tls else None, api_key_file=key_file)


def _tls_inside(tls: Tls) -> Tls:
    seen = {field: _TLS_FOLDER / f"{field}.pem" for field in tls.files}
    if tls.loopback_certificate == tls.certificate:  # one file is mounted once
        seen |= {"loopback_certificate": seen["certificate"], "loopback_key": seen["key"]}
    return Tls(**seen, name=tls.name)


def _name(mark: str) -> str:
    return f"minitron-{mark}"
