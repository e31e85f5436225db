"""kill -9 at random moments of a server's life, each followed by ``minitron serve``: all must start, nothing be left.

``make drill-kill`` runs a hundred, the test suite one of each moment. What is there is counted as in ``supervisor``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [
        str(TESTS),
        *(str(TESTS.parent / room) for room in ("core", "build", "model_repo", "clients", "cli")),
    ]

import echo_repository  # noqa: E402
from conftest import minitron  # noqa: E402
from minitron.errors import ClientError  # noqa: E402
from minitron_client.client import Client  # noqa: E402
from supervisor import Supervisor, ask, command_lines, segments, within  # noqa: E402

MOMENTS = ("start", "load", "stream", "drain")
_STREAMS = 4
_PATIENCE_S = 120.0


class Drill:
    """Kills on one repository, with the servers' state in the folder ``state``."""

    def __init__(self, repository: Path, state: Path, seed: int) -> None:
        self._repository, self._state, self._random = repository, state, random.Random(seed)
        self._marks: set[str] = set()
        self.kills: Counter[str] = Counter()

    def kill(self, moment: str) -> None:
        """One kill -9, and what must be true after it; raises AssertionError."""
        one = Supervisor(self._repository, self._state)
        victim = self._random.choice(("supervisor", "tritonserver", "stub"))
        threads: list[threading.Thread] = []
        if moment == "start":
            victim = "supervisor"
            self._pause(0.6)
        elif moment == "load":
            assert within(_PATIENCE_S, lambda: self._pid(one, victim) is not None or one.process.poll() is not None)
            self._pause(0.1)
        else:
            one.wait_until_ready()
            threads = [threading.Thread(target=_stream, args=(one.url,)) for _ in range(_STREAMS)]
            for thread in threads:
                thread.start()
            self._pause(0.5)
        if moment == "drain":
            one.send(signal.SIGTERM)
            self._pause(1.0)
        pid = self._pid(one, victim)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.kills[f"{moment}, {victim}"] += 1
        self._note_marks()
        self._serve_again()
        for thread in threads:
            thread.join()
        minitron("stop", self._repository, "--state", self._state, check=False)
        one.end(_PATIENCE_S)
        self._nothing_is_left()

    def _pause(self, most_s: float) -> None:
        time.sleep(self._random.random() * most_s)  # the moment is what is random here

    def _pid(self, one: Supervisor, victim: str) -> int | None:
        if victim == "supervisor":
            return one.process.pid if one.process.poll() is None else None
        name = "/bin/tritonserver " if victim == "tritonserver" else "/triton_python_backend_stub "
        return next((pid for pid, words in command_lines(str(self._state)).items() if name in words), None)

    def _serve_again(self) -> None:
        next_one = Supervisor(self._repository, self._state).wait_until_ready()
        assert ask(next_one.url, 2) == ["0 ", "1 "]
        self._note_marks()
        next_one.send(signal.SIGTERM)
        code, said = next_one.end(_PATIENCE_S)
        assert code == 0, said

    def _note_marks(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._marks |= {name.strip(".").partition(".")[0] for name in os.listdir(self._state)}

    def _nothing_is_left(self) -> None:
        self._note_marks()
        assert within(10, lambda: not command_lines(str(self._state))), command_lines(str(self._state))
        for mark in self._marks:
            assert not segments(mark), segments(mark)
        for folder in self._state.iterdir():
            assert sorted(os.listdir(folder)) == ["server.log", "state.json"], folder

    def end(self) -> None:
        """A last server of the repository, after which not even a log is there."""
        self._serve_again()
        assert list(self._state.iterdir()) == []


def _stream(url: str) -> None:
    with (
        contextlib.suppress(ClientError),
        Client(url, model="echo", deadline_s=20) as client,
        client.stream("hi", max_tokens=30) as stream,
    ):
        list(stream)


def main(say: Callable[[str], None] = print) -> None:
    """Run the drill on a repository of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-drill-") as scratch:
        drill = Drill(echo_repository.write(Path(scratch) / "repository"), Path(scratch) / "state", args.seed)
        for number in range(args.kills):
            drill.kill(MOMENTS[number % len(MOMENTS)])
            say(f"{number + 1} of {args.kills}")
        drill.end()
    say(f"seed {args.seed}: {sum(drill.kills.values())} kills, every next server started, nothing is left")
    for what, count in sorted(drill.kills.items()):
        say(f"  {what}: {count}")


if __name__ == "__main__":
    main()
