"""The ``tritonserver`` (2.51.0, Python backend, no GPU) inside the PyPI wheel nvidia-pytriton.

The wheel keeps the stub processes of the Python backend, one per Python version, apart from the backend; the server
wants them together. So a private copy of the backend is made for each server. What the server needs besides was found
by trying, see docs/serving.md.

The Python backend starts its processes by a line of shell in which no path is quoted, and Python in these processes
knows no file names but ASCII. So where a path holds anything but plain characters, the server is given links to what
lies there, and configs that name the links.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from minitron import extras
from minitron.errors import MachineError, MissingDependency, RepositoryError
from minitron.machine import compat
from minitron.machine.memory import LEAST_SHM_BYTES
from minitron_triton.repository import config_text
from minitron_triton.server import cpu_memory
from minitron_triton.server.flags import flags, shared_memory_prefix
from minitron_triton.server.launch import (
    MARK_VARIABLE,
    Launch,
    Options,
    Ports,
    Served,
    loopback,
    reachable,
    without_loopback,
)

_SHM = Path("/dev/shm")
_REPOSITORY = "repository"  # in the runtime folder
_INSTALL = extras.install("cpu")


@dataclass(frozen=True)
class Wheel:
    """Where the parts of nvidia-pytriton and the shared libpython lie."""

    server: Path
    libraries: Path
    backends: Path
    stub: Path
    libpython: Path


def find() -> Wheel:
    """Find the server in this Python's packages, without importing them; raises MachineError, MissingDependency."""
    if problem := compat.bundled_problem():
        raise MachineError(problem)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(f"the package nvidia-pytriton, which carries Triton, is not installed: {_INSTALL}")
    package = Path(next(iter(spec.submodule_search_locations)))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheel = Wheel(
        server=package / "tritonserver" / "bin" / "tritonserver",
        libraries=package.parent / "nvidia_pytriton.libs",
        backends=package / "tritonserver" / "backends",
        stub=package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub",
        libpython=_find_libpython(version),
    )
    for part in (wheel.server, wheel.libraries, wheel.backends, wheel.stub):
        if not part.exists():
            raise MissingDependency(
                f"{part} is missing, so the package nvidia-pytriton is another or damaged: {_INSTALL}"
            )
    return wheel


def _find_libpython(version: str) -> Path:
    """The shared libpython that the stub process loads."""
    name = f"libpython{version}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    for folder in folders:
        if folder and (path := Path(folder, name)).is_file():
            return path
    raise MissingDependency(
        f"{name} is not there (this Python has no shared library), and Triton's Python backend needs it: "
        f"'apt-get install libpython{version}' for Debian's or Ubuntu's Python, 'uv python install {version}', or "
        "pyenv with PYTHON_CONFIGURE_OPTS=--enable-shared"
    )


def check_machine(served: Served, *, gateway: bool = False) -> None:
    """Refuse what cannot work here, with a gateway beside it where there will be one.

    Raises MachineError, MissingDependency, NotEnoughMemory, RepositoryError.
    """
    if served.world_size != 1:
        raise RepositoryError(f"{served.folder} is for {served.world_size} ranks; the bundled server runs one")
    if served.root.resolve() != served.folder.resolve():
        raise RepositoryError(
            f"{served.folder} was rendered to lie at {served.root}; render it again for where it is (or move it back)"
        )
    if served.engine.is_dir():
        cpu_memory.check(served.folder, gateway=gateway)
    free = shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0
    if free < LEAST_SHM_BYTES:
        raise MachineError(
            f"{_SHM} has {free >> 20} MiB free and Triton needs {LEAST_SHM_BYTES >> 20}; free some, or give the "
            "container more (docker run --shm-size=1g)"
        )


def prepare(runtime: Path) -> None:
    """Put the backend, its stub and libpython together in ``runtime``."""
    wheel = find()
    backends = runtime / "backends"
    shutil.copytree(wheel.backends, backends, ignore=shutil.ignore_patterns("__pycache__"))
    stub = backends / "python" / wheel.stub.name
    shutil.copyfile(wheel.stub, stub)
    stub.chmod(0o755)
    # A folder of its own: LIBDIR may hold a libstdc++ (conda) that the server must not meet.
    (runtime / "lib").mkdir()
    (runtime / "lib" / wheel.libpython.name).symlink_to(wheel.libpython)
    (runtime / "wheel").symlink_to(wheel.libraries)  # whose path may hold what ends a path in LD_LIBRARY_PATH


def link(served: Served, runtime: Path, mark: str) -> None:
    """Make the links that ``launch`` counts on; that to ``runtime`` goes with the server's shared memory."""
    seen = _seen(runtime, mark)
    if seen != runtime:
        seen.symlink_to(runtime)
    if not _plain(served.folder, served.root):
        (runtime / _REPOSITORY).mkdir()
        for entry in served.folder.iterdir():
            target = runtime / _REPOSITORY / entry.name
            _link_model(entry, target, served, seen) if entry.name in served.models else target.symlink_to(entry)


def _link_model(model: Path, target: Path, served: Served, runtime: Path) -> None:
    """A model's folder with its config written anew, for where the links lie."""
    target.mkdir()
    for entry in model.iterdir():
        if entry.name == "config.pbtxt":
            root, seen = (config_text.quote(str(path))[1:-1] for path in (served.root, runtime / _REPOSITORY))
            (target / entry.name).write_text(entry.read_text(encoding="utf-8").replace(root, seen), encoding="utf-8")
        else:
            (target / entry.name).symlink_to(entry)


def _plain(*paths: Path) -> bool:
    """Whether each path can stand in a line of shell, and (no colon) in a list of paths, as it is."""
    return all(re.fullmatch(r"[\w%+=,./@-]+", str(path), re.ASCII) for path in paths)


def _seen(runtime: Path, mark: str) -> Path:
    return runtime if _plain(runtime) else _SHM / f"{shared_memory_prefix(mark)}folder"


def launch(served: Served, options: Options, ports: Ports, runtime: Path, mark: str) -> Launch:
    """The server as a child process of this machine; ``runtime`` is what ``prepare`` and ``link`` make."""
    wheel, runtime = find(), _seen(runtime, mark)
    repository = served.folder if _plain(served.folder, served.root) else runtime / _REPOSITORY
    more = (
        f"--backend-directory={runtime / 'backends'}",
        "--pinned-memory-pool-byte-size=0",
        "--allow-gpu-metrics=false",
    )
    words = flags(
        served,
        options,
        repository=str(repository),
        ports=ports,
        mark=mark,
        bind_http=options.http_host,
        bind_metrics=options.metrics_bind,
        more=more,
    )
    argv = [str(wheel.server), *words]
    calls = loopback(f"{reachable(options.host)}:{ports.grpc}", options.tls, options.api_key_file)
    return Launch(mark, tuple(argv), environment(runtime, mark) | calls, None, options.secrets)


def environment(runtime: Path, mark: str) -> dict[str, str]:
    """Environment variables of the server, but for those by which it calls itself (``launch.loopback``)."""
    # Of Triton's own: AIP_MODE makes it Vertex AI's server, on another port alone; TRITON_SERVER_ESCAPE_LOG_MESSAGES
    # changes the log that the supervisor reads; TRITONSERVER_DELAY_GRPC_... slows it (they are for its tests).
    dropped = ("PYTHONHOME", "PYTHONPATH", "AIP_", "TRITON_SERVER_", "TRITONSERVER_")
    own = without_loopback(os.environ)
    inherited = {name: value for name, value in own.items() if not name.startswith(dropped)}
    return inherited | {
        # The stub finds its packages through the first python3 on PATH.
        "PATH": _join(str(Path(sys.executable).parent), inherited.get("PATH")),
        "LD_LIBRARY_PATH": _join(str(runtime / "lib"), str(runtime / "wheel"), inherited.get("LD_LIBRARY_PATH")),
        "HF_HUB_OFFLINE": "1",
        MARK_VARIABLE: mark,
    }


def _join(*paths: str | None) -> str:
    return os.pathsep.join(filter(None, paths))
