"""One folder per server: what ``minitron status`` and ``minitron stop`` read, the log, the private backend.

The folder lies in ``$XDG_STATE_HOME/minitron-trtllm/servers`` (``~/.local/state`` where that is not set), not beside
the repository, which may be read-only. Its name is the server's mark, so servers of any repository never collide. It
appears with its state in it and vanishes in one step: between the two it has a hidden name that says whose it is.

A server ends with its folder. Where it ended otherwise than by a clean drain, state and log stay until its repository
is served again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron import files
from minitron.errors import OutputError
from minitron_triton.server import leftovers
from minitron_triton.server.leftovers import Process

_NAME = "state.json"
_LOG = "server.log"
SCHEMA = 1
#: Of a server that has a supervisor.
LIVING = ("starting", "ready", "restarting", "draining")
#: Of one that has ended, and nothing of it is left but this: it did not start or crashed; it had to be killed; its
#: supervisor was; it was drained well, but had crashed before.
ENDED = ("failed", "killed", "dead", "stopped")


@dataclass(frozen=True)
class State:
    """A server as its supervisor last wrote it down.

    ``phase`` is one of LIVING or ENDED; ``urls`` maps grpc, http and metrics to host:port; ``container`` is the name of
    the container where there is one; ``restarts`` how often the server was started again after a crash.
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
    restarts: int = 0

    @property
    def log(self) -> Path:
        """What tritonserver and the models print."""
        return self.folder / _LOG

    @property
    def alive(self) -> bool:
        """Whether the supervisor lives."""
        return self.supervisor.lives()

    @property
    def ended(self) -> bool:
        """Whether nothing is left but the log."""
        return self.phase in ENDED

    def document(self) -> dict[str, Any]:
        """As JSON values, for the state file and for ``--json``."""
        plain = asdict(self) | {"schema": SCHEMA, "log": self.log}
        return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}

    def create(self) -> None:
        """Make the folder, readable by its owner alone, with the state in it; raises OutputError."""
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            hidden = _hidden(self.folder)
            hidden.mkdir(mode=0o700)
            self._write(hidden)
            hidden.rename(self.folder)
        except OSError as error:
            raise OutputError(
                f"cannot write into {parent} ({error.strerror}); --state FOLDER chooses another"
            ) from error

    def _write(self, folder: Path) -> None:
        files.write_text(folder / _NAME, json.dumps(self.document(), indent=1) + "\n")

    def enter(self, phase: str, **changes: Any) -> State:
        """Write down that the server is in another phase, and what else changed."""
        assert phase in LIVING + ENDED
        entered = replace(self, phase=phase, **changes)
        entered._write(self.folder)
        return entered

    def reap(self) -> int:
        """End what still runs of the server, remove its shared memory; returns the number of processes ended."""
        if self.container and shutil.which("docker"):
            subprocess.run(["docker", "kill", self.container], capture_output=True, check=False)
        return leftovers.remove(self.mark)

    def keep(self, phase: str) -> int:
        """``reap``, and keep state and log for a look at what went wrong; returns what ``reap`` does."""
        ended = self.reap()
        for entry in self.folder.iterdir():
            if entry.name not in (_NAME, _LOG):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.enter(phase)
        return ended

    def clear(self) -> int:
        """``reap``, and forget the server and its log; returns what ``reap`` does."""
        ended = self.reap()
        hidden = _hidden(self.folder)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        return ended


def home() -> Path:
    """Where the servers' folders lie unless ``--state`` says otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base, "minitron-trtllm", "servers")


def servers(parent: Path, repository: Path | None = None) -> list[State]:
    """The servers that were started and not cleared away, of one repository or of all, oldest first.

    What a killed supervisor left of any server is removed first, but for its state and log.
    """
    _remove_hidden(parent)
    found = [state for path in sorted(parent.glob(f"*/{_NAME}")) if (state := _tidied(path))]
    if repository is not None:
        found = [state for state in found if os.path.realpath(state.repository) == os.path.realpath(repository)]
    return sorted(found, key=lambda state: state.supervisor.started)


def _tidied(path: Path) -> State | None:
    state = read(path.parent)
    if state is None or state.ended or state.alive:
        return state
    state = read(path.parent)  # its supervisor may have ended well just now
    if state is None or state.ended:
        return state
    with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
        state.keep("dead")
    return read(path.parent)


def read(folder: Path) -> State | None:
    """The state in a server's folder; None where there is none that this version can read."""
    try:
        raw = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            return None
        return State(
            folder, raw["mark"], Path(raw["repository"]), raw["front"], Process(**raw["supervisor"]), raw["phase"],
            raw["urls"], raw["exit_timeout_s"], raw["container"], raw.get("restarts", 0),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hidden(folder: Path) -> Path:
    me = Process.of(os.getpid())
    assert me is not None
    return folder.with_name(f".{folder.name}.{me.pid}.{me.started}")


def _remove_hidden(parent: Path) -> None:
    """Remove the folders of those who were killed while they made or removed them."""
    for path in parent.glob(".*.*.*"):
        pid, started = path.name.split(".")[-2:]
        if pid.isdigit() and started.isdigit() and not Process(int(pid), int(started)).lives():
            shutil.rmtree(path, ignore_errors=True)
