"""Which trace a request belongs to, on its way from one program to the next: W3C's Trace Context (levels 1 and 2).

Nothing is traced here: a header that came is read, and handed on with the next request. It needs no package, so the
text model has it inside NVIDIA's image too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextvars import ContextVar

#: Headers of a request, ``traceparent`` and perhaps ``tracestate``; none where no trace is known.
Headers = tuple[tuple[str, str], ...]
#: Those that whatever this task asks of others goes out with.
CURRENT: ContextVar[Headers] = ContextVar("minitron_trace", default=())

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
_STATE = re.compile(r"[\x20-\x7e]+")
_LONGEST_STATE = 512  # what the specification demands of everybody who hands it on
_SAMPLED, _RANDOM = 1, 2  # the flags that are known; the others of a new header are to be 0


def received(parents: Sequence[str], states: Sequence[str] = ()) -> Headers:
    """What of a request's headers is handed on: all values of ``traceparent`` and ``tracestate``, in their order.

    Nothing where there is not one ``traceparent``, or an invalid one. One of a later version is written in ours. A
    ``tracestate`` that is too long, or cannot be a header, is left out.
    """
    found = _PARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["rest"]):
        return ()
    if not found["trace"].strip("0") or not found["span"].strip("0"):
        return ()
    flags = int(found["flags"], 16) & (_SAMPLED | _RANDOM)
    parent = ("traceparent", f"00-{found['trace']}-{found['span']}-{flags:02x}")
    state = ",".join(filter(None, (one.strip(" \t") for one in states)))
    if len(state) <= _LONGEST_STATE and _STATE.fullmatch(state):
        return (parent, ("tracestate", state))
    return (parent,)


def of_triton(context: str | None) -> Headers:
    """From what Triton's Python backend says of a request's trace (``InferenceTrace.get_context``): JSON, or None."""
    if not context:
        return ()
    try:
        headers = json.loads(context)
        return received([headers["traceparent"]], [headers.get("tracestate", "")])
    except (ValueError, LookupError, TypeError, AttributeError):
        return ()


def for_triton(headers: Headers) -> Headers:
    """What Triton is to be told: nothing of a trace that is not sampled.

    Triton (2.51) traces whatever comes with a context, and does not look at its flag.
    """
    return headers if headers and int(headers[0][1][-2:], 16) & _SAMPLED else ()
