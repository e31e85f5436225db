"""A stand-in for ``tensorrt_llm`` that costs next to nothing: every 5 ms one token for each request that is there.

Tokens are words of the small Minitron's vocabulary. Streams as the C++ backend does, ends at ``stop`` by id.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

STEP_S = 0.005
_FIRST_ID, _IDS = 300, 600
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class _Request:
    """One that is being answered: tokens to come, and how many did."""

    def __init__(self, request_id: str, sender: Any, tokens: int, *, streams: bool) -> None:
        self.id, self.sender, self.tokens, self.streams = request_id, sender, tokens, streams
        self.made, self.stopped = 0, False


class TritonPythonModel:
    """One thread steps for all."""

    def initialize(self, args: Any) -> None:
        """Start stepping."""
        self._changed, self._there = threading.Condition(), list[_Request]()
        threading.Thread(target=self._run, daemon=True).start()

    def execute(self, requests: Any) -> None:
        """Take requests in."""
        for request in requests:
            values = {one.name(): one.as_numpy().reshape(-1) for one in request.inputs()}
            sender = request.get_response_sender()
            with self._changed:
                if "stop" in values and values["stop"][0]:
                    for other in self._there:
                        other.stopped = other.stopped or other.id == request.request_id()
                    sender.send(flags=FINAL)
                    continue
                tokens, streams = int(values["request_output_len"][0]), bool(values["streaming"][0])
                self._there.append(_Request(request.request_id(), sender, tokens, streams=streams))
                self._changed.notify()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                while not self._there:
                    self._changed.wait()
                    due = time.monotonic()
                batch = list(self._there)
            due = max(due + STEP_S, time.monotonic() - STEP_S)
            time.sleep(max(due - time.monotonic(), 0))
            ended = [request for request in batch if _step(request)]
            with self._changed:
                self._there = [request for request in self._there if request not in ended]


def _step(request: _Request) -> bool:
    """Send a request's next token; whether it was the last."""
    if request.stopped:
        request.sender.send(flags=FINAL)
        return True
    request.made += 1
    is_last = request.made == request.tokens
    if request.streams or is_last:
        first = request.made - 1 if request.streams else 0
        ids = [_FIRST_ID + place % _IDS for place in range(first, request.made)]
        tensors = [
            pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
        ]
        request.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if is_last else 0)
    return is_last
