"""The two servers with a known schedule that ``bench_client`` measures against, as child processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_serve import minitron_serve

from minitron.artifacts import manifest
from minitron_client.client.endpoint import Endpoint

_HERE = Path(__file__).parent


@dataclass
class Bare:
    """``scheduled_server.py``, running."""

    process: subprocess.Popen[str]
    endpoint: Endpoint

    def counted(self) -> dict[str, int]:
        """What it has counted until now."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]


@contextlib.contextmanager
def bare() -> Iterator[Bare]:
    """The bare process."""
    words = [sys.executable, str(_HERE / "scheduled_server.py")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield Bare(process, Endpoint(f"127.0.0.1:{int(process.stdout.readline())}"))
        finally:
            process.kill()


@dataclass
class Triton:
    """The real Triton with ``scheduled_model``, running below ``process`` (``minitron serve``)."""

    process: subprocess.Popen[str]
    endpoint: Endpoint
    metrics_url: str


@contextlib.contextmanager
def triton() -> Iterator[Triton]:
    """The real Triton, started by ``minitron serve``, with ``scheduled_model`` in its Python backend."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with minitron_serve(write_repository(work / "repository"), work) as (process, state):
            yield Triton(process, Endpoint(state["urls"]["grpc"]), state["urls"]["metrics"])


def write_repository(folder: Path) -> Path:
    """A model repository that holds ``scheduled_model``."""
    version = folder / "scheduled" / "1"
    version.mkdir(parents=True)
    shutil.copy(_HERE / "scheduled_model" / "config.pbtxt", version.parent)
    for source in (_HERE / "scheduled_model" / "model.py", _HERE / "timetable.py"):
        shutil.copy(source, version)
    details = {"backend": "python", "models": ["scheduled"], "front": "scheduled", "root": str(folder),
               "world_size": 1, "bls_max_concurrency": 1, "shm_bytes": 2 << 30}  # fmt: skip
    manifest.write(folder, "repository", manifest.Input("engine", "none", "0"), arguments={}, details=details)
    return folder
