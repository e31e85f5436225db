"""How a model of ours ends what it says to a client: Triton's rules for a response sender, kept by ``Reply``.

The rules are those of the server (contract of the model repository: nothing behind the final flag, ``is_cancelled``
never beside ``send``, the closing call to a client that has left not together with the news of it); the sender here
keeps them and says which one was broken. What the server does when they are broken, only a soak shows (make soak).
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL of tritonserver.h


class Sender:
    """A response sender; ``left`` is when the client left, on the clock of ``time.monotonic``."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, int]] = []
        self.left = self.told = 0.0
        self.closed = threading.Event()
        self._busy = threading.Lock()

    def send(self, response: Any = None, flags: int = 0) -> None:
        with self._alone():
            self.said.append((response, flags))
            self.told = time.monotonic()
            if flags == FINAL:
                self.closed.set()

    def is_cancelled(self) -> bool:
        with self._alone():
            return self.left > 0

    def leave(self) -> None:
        self.left = time.monotonic()

    def _alone(self) -> threading.Lock:
        assert not self.closed.is_set(), "something is asked or said behind the final flag"
        assert not self._busy.locked(), "two threads are at one sender"
        return self._busy


@pytest.fixture
def reply(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with the utilities of the Python backend in the wheel that it runs beside."""
    wheel = importlib.util.find_spec("pytriton")
    assert wheel is not None and wheel.submodule_search_locations
    monkeypatch.syspath_prepend(str(Path(wheel.submodule_search_locations[0], "tritonserver", "backends", "python")))
    import reply

    yield reply
    for name in ("reply", "triton_python_backend_utils"):
        del sys.modules[name]


def test_the_last_response_and_the_final_flag_are_one_call(reply: ModuleType) -> None:
    sender = Sender()
    told = reply.Reply(sender)
    told.send("a")
    told.close("b")
    assert sender.said == [("a", 0), ("b", FINAL)]


def test_nothing_is_said_or_asked_behind_the_final_flag(reply: ModuleType) -> None:
    sender = Sender()
    told = reply.Reply(sender)
    told.close()
    told.send("late")
    told.close("error")
    assert not told.has_left()
    assert sender.said == [(None, FINAL)]


def test_a_client_that_has_left_gets_the_closing_call_alone_and_later(reply: ModuleType) -> None:
    sender = Sender()
    told = reply.Reply(sender)
    told.send("a")
    sender.leave()
    assert told.has_left()
    told.send("b")
    told.close("c")
    assert sender.said == [("a", 0)]
    assert sender.closed.wait(60)
    assert sender.said == [("a", 0), ("c", FINAL)]
    assert sender.told - sender.left >= reply.CLOSING_PAUSE_S


def test_a_client_that_left_unseen_is_seen_before_the_closing_call(reply: ModuleType) -> None:
    sender = Sender()
    told = reply.Reply(sender)
    sender.leave()
    told.close("c")
    assert sender.said == []
    assert sender.closed.wait(60)
    assert sender.told - sender.left >= reply.CLOSING_PAUSE_S


def test_threads_take_turns_at_the_sender(reply: ModuleType) -> None:
    """One asks, one says, as the watcher and the engine do."""
    sender, broken = Sender(), []
    told = reply.Reply(sender)

    def run(work: Any) -> None:
        try:
            for _ in range(20_000):
                work()
        except AssertionError as error:
            broken.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in (told.has_left, lambda: told.send("a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.close()
    assert not broken and len(sender.said) == 20_001
