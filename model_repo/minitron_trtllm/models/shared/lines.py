"""What the front and its lines say to each other, and why there are lines.

A line is a process that carries one request at a time to tensorrt_llm and its responses back. The front cannot do that
itself for many requests: in Triton's Python backend (2.51, and its main branch of July 2026) a process deadlocks in
which one thread waits for a response of a decoupled request while another thread's request gets its first one.
``ResponseIterator::Next`` takes the GIL back while it holds the iterator's mutex; the thread that delivers responses
holds the mutex of all iterators while it waits for that one; and ``exec`` waits for the mutex of all iterators while it
holds the GIL. Under 64 fast streams that took seconds. One request per process cannot do it.

The front asks the model of the lines, an ordinary request that lasts as long as the job, so that Triton chooses a free
line and ends none that is at work. The line calls back over the front's Unix socket (``multiprocessing.connection``)
and says which job it has; the front sends it (None if nobody wants it any more), and the line answers with ("tensors",
name to array) for each response, ("error", text) for each error, and END.
"""

from __future__ import annotations

from typing import Any, NamedTuple

END = ("end", None)


class Job(NamedTuple):
    """A request for ``model``: its id there, its inputs by name, and the outputs that are wanted."""

    model: str
    request_id: str
    inputs: dict[str, Any]
    wanted: list[str]
