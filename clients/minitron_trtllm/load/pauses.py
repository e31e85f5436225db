"""Python's garbage collector held back while requests are measured: its pauses would read as the server's latency.

Going through everything that a process holds takes it milliseconds, up to 24 measured. Sending leaves it nothing to
find: neither grpc.aio nor our records make cycles, whether a request ends well or not (a test holds that).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect before, and not again until the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
