"""One folder per running server: what ``minitron status`` and ``minitron stop`` read, the log, the private backend.

The folder lies in ``$XDG_STATE_HOME/minitron-trtllm/servers`` (``~/.local/state`` where that is not set), not beside
the repository, which may be read-only. Its name holds the server's mark, so servers of any repository never collide.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron_trtllm import files
from minitron_trtllm.errors import OutputError
from minitron_trtllm.server import leftovers
from minitron_trtllm.server.leftovers import Process

_NAME = "state.json"
SCHEMA = 1
PHASES = ("starting", "ready", "draining", "failed")


@dataclass(frozen=True)
class State:
    """A server as its supervisor last wrote it down.

    ``phase`` is one of PHASES; ``urls`` maps grpc, http and metrics to host:port; ``container`` is the name of the
    container where there is one.
    """

    folder: Path
    mark: str
    repository: Path
    front: str
    supervisor: Process
    phase: str
    urls: dict[str, str]
    exit_timeout_s: int
    container: str | None = None

    @property
    def log(self) -> Path:
        """What tritonserver and the models print."""
        return self.folder / "server.log"

    @property
    def alive(self) -> bool:
        """Whether the supervisor lives."""
        return self.supervisor.lives()

    @property
    def seen_phase(self) -> str:
        """The phase, or "dead" when the supervisor is gone and did not say so."""
        return self.phase if self.alive or self.phase == "failed" else "dead"

    def document(self) -> dict[str, Any]:
        """As JSON values, for the state file and for ``--json``."""
        plain = asdict(self) | {"schema": SCHEMA, "log": self.log}
        return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}

    def write(self) -> None:
        """Put it on the disk, whole."""
        files.write_text(self.folder / _NAME, json.dumps(self.document(), indent=1) + "\n")

    def enter(self, phase: str) -> State:
        """Write down that the server is in another phase."""
        assert phase in PHASES
        entered = replace(self, phase=phase)
        entered.write()
        return entered

    def reap(self) -> int:
        """End what still runs of the server, remove its shared memory; returns the number of processes ended."""
        if self.container and shutil.which("docker"):
            subprocess.run(["docker", "kill", self.container], capture_output=True, check=False)
        return leftovers.remove(self.mark)

    def fail(self) -> None:
        """``reap``, and keep the log for a look at what went wrong."""
        self.reap()
        for private in ("backends", "lib"):
            shutil.rmtree(self.folder / private, ignore_errors=True)
        self.enter("failed")

    def clear(self) -> int:
        """``reap``, and forget the server and its log."""
        ended = self.reap()
        shutil.rmtree(self.folder, ignore_errors=True)
        return ended


def home() -> Path:
    """Where the servers' folders lie unless ``--state`` says otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base, "minitron-trtllm", "servers")


def new_folder(parent: Path, mark: str) -> Path:
    """Make the folder of a new server, readable by its owner alone; raises OutputError."""
    folder = parent / mark
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise OutputError(f"cannot write into {parent} ({error.strerror}); --state FOLDER chooses another") from error
    return folder


def servers(parent: Path, repository: Path | None = None) -> list[State]:
    """The servers that were started and not cleared away, of one repository or of all, oldest first."""
    found = [state for path in sorted(parent.glob(f"*/{_NAME}")) if (state := _read(path))]
    if repository is not None:
        found = [state for state in found if state.repository == Path(os.path.abspath(repository))]
    return sorted(found, key=lambda state: state.supervisor.started)


def _read(path: Path) -> State | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            return None
        return State(
            path.parent, raw["mark"], Path(raw["repository"]), raw["front"], Process(**raw["supervisor"]), raw["phase"],
            raw["urls"], raw["exit_timeout_s"], raw["container"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None
