"""How the processes that send are started: anew, because gRPC does not survive a fork, and with gRPC's cheaper reading.

By default gRPC (1.85) reads sockets in the threads of its event engine: five changes of thread for each message.
Without, the thread that waits for messages reads them itself: one change, and a third less CPU time. A gRPC that no
longer knows the setting says so on stderr and goes on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator

SPAWN = multiprocessing.get_context("spawn")
_SETTING, _WITHOUT_EVENT_ENGINE = "GRPC_EXPERIMENTS", "-event_engine_client"


@contextlib.contextmanager
def lean_grpc() -> Iterator[None]:
    """Processes that are started meanwhile read so; what the user has set himself stays."""
    if _SETTING in os.environ:
        yield
        return
    os.environ[_SETTING] = _WITHOUT_EVENT_ENGINE
    try:
        yield
    finally:
        del os.environ[_SETTING]
