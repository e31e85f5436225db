"""Answers inside the real Triton on the schedule that each request's prompt holds, stamping every response.

``times_ns`` is when a response was due and when it was handed to Triton (CLOCK_MONOTONIC, which all processes of a
machine share). ``timetable.py`` lies beside this file.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from timetable import Schedule, Timetable, be_punctual

_THREADS = 4  # handing a response to Triton takes a while, and meanwhile the next one comes due


class TritonPythonModel:
    """Takes requests in; each is answered by one of a few threads."""

    def initialize(self, args: Any) -> None:
        """Start the answering threads."""
        gc.freeze()
        gc.disable()  # a collection in the middle would be lateness; the process lives for minutes
        self._next = itertools.cycle([_Answering() for _ in range(_THREADS)])

    def execute(self, requests: Any) -> None:
        """Put requests on the timetables."""
        for request in requests:
            prompt = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
            tokens = int(pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy().reshape(-1)[0])
            next(self._next).add(request.get_response_sender(), Schedule.of_prompt(prompt), tokens)


class _Answering:
    """A thread with a timetable of its own, so that the responses of a stream keep their order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._timetable: Timetable[Any] = Timetable()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, sender: Any, schedule: Schedule, tokens: int) -> None:
        with self._changed:
            self._timetable.add(sender, schedule, tokens, time.monotonic_ns())
            self._changed.notify()

    def _run(self) -> None:
        be_punctual()
        while True:
            with self._changed:
                while (due := self._timetable.take(time.monotonic_ns())) is None:
                    next_ns = self._timetable.next_ns
                    self._changed.wait(None if next_ns is None else max(next_ns - time.monotonic_ns(), 0) / 1e9)
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if due.is_last else 0
            due.stream.send(_response(due.due_ns, time.monotonic_ns()), flags=flags)


def _response(due_ns: int, sent_ns: int) -> Any:
    return pb_utils.InferenceResponse([
        pb_utils.Tensor("num_output_tokens", np.array([[1]], np.int32)),
        pb_utils.Tensor("times_ns", np.array([[due_ns, sent_ns]], np.int64)),
    ])  # fmt: skip
