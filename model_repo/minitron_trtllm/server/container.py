"""Triton with TensorRT-LLM in its pinned container, for a repository with a GPU engine.

``docker run`` is the supervisor's child here: it hands SIGTERM on to the container's first process, which is
tritonserver itself (the image's entrypoint ends in ``exec``), and its exit code is that one's. Flags of the container:
shared memory, locked memory and stack as NVIDIA's Triton documentation asks for.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_trtllm.errors import MissingDependency
from minitron_trtllm.repository.options import IMAGE
from minitron_trtllm.server.flags import flags
from minitron_trtllm.server.launch import MARK_VARIABLE, UNLOAD_S, Launch, Options, Ports, Served, Tls

_SHM_SIZE = "2g"
_STACK_BYTES = 64 << 20
_ALL = "0.0.0.0"
_INSIDE = Ports()
_COMPOSED_EXIT_TIMEOUT_S = 60
_DOCKER_S = 5  # of the grace, for docker itself
_TLS_FOLDER = "/run/minitron-tls"


def check_machine() -> None:
    """Raises MissingDependency where there is no docker."""
    if shutil.which("docker") is None:
        raise MissingDependency(
            "docker is not on PATH, and a GPU engine is served in NVIDIA's container; install Docker with the NVIDIA "
            "container toolkit, or see the command with --dry-run"
        )


def launch(served: Served, options: Options, ports: Ports, runtime: Path, mark: str) -> Launch:
    """``docker run`` as a child process of this machine; it needs no ``runtime`` folder."""
    argv = ["docker", "run", *_docker_flags(served, options, ports, mark), served.image or IMAGE]
    argv += command(served, _inside(options), mark)
    secrets = tuple(filter(None, (options.api_key, options.server_key)))
    return Launch(mark, tuple(argv), dict(os.environ) | {MARK_VARIABLE: mark}, _name(mark), secrets)


def _docker_flags(served: Served, options: Options, ports: Ports, mark: str) -> list[str]:
    words = [
        "--rm", f"--name={_name(mark)}", f"--gpus={options.gpus}", f"--shm-size={_SHM_SIZE}",
        "--ulimit=memlock=-1", f"--ulimit=stack={_STACK_BYTES}",
        f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/tmp",
        f"--stop-timeout={served.exit_timeout_s(options.exit_timeout_s) + UNLOAD_S}",
        f"--publish={options.host}:{ports.grpc}:{_INSIDE.grpc}",
        f"--publish={options.http_host}:{ports.http}:{_INSIDE.http}",
        f"--publish={options.http_host}:{ports.metrics}:{_INSIDE.metrics}",
        f"--volume={served.folder}:{served.root}:ro",
    ]  # fmt: skip
    if options.tls:
        inside = _tls_inside(options.tls)
        pairs = (
            (options.tls.certificate, inside.certificate),
            (options.tls.key, inside.key),
            (options.tls.ca, inside.ca),
        )
        words += [f"--volume={outside}:{path}:ro" for outside, path in pairs if outside]
    return words


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
    """``command`` and ``grace_s`` of a compose file, which is written once for all starts and so holds no key."""
    options = Options(exit_timeout_s=_COMPOSED_EXIT_TIMEOUT_S, server_key="")
    grace_s = served.exit_timeout_s(options.exit_timeout_s) + UNLOAD_S + _DOCKER_S
    return {"command": command(served, _inside(options), "compose"), "grace_s": grace_s}


def _inside(options: Options) -> Options:
    """The same options as the server in the container sees them: it listens everywhere, Docker publishes less."""
    return replace(options, host=_ALL, tls=_tls_inside(options.tls) if options.tls else None)


def _tls_inside(tls: Tls) -> Tls:
    folder = Path(_TLS_FOLDER)
    return Tls(folder / "server.pem", folder / "server.key", folder / "ca.pem" if tls.ca else None)


def _name(mark: str) -> str:
    return f"minitron-{mark}"
