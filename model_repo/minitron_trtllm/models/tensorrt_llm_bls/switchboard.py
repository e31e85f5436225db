"""The front's side of its lines to the engine: one job over one line, and the answers to it."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from lines import END, Job

_LINES = "tensorrt_llm_bls_lines"


class LineLost(Exception):
    """No line took the job, or it broke in the middle."""


class Switchboard:
    """``jobs`` at the same time, if so many lines are free; the others wait."""

    def __init__(self, jobs: int) -> None:
        """Listen in a folder that is open to this user alone; raises OSError."""
        self._folder = tempfile.mkdtemp(prefix="minitron-")
        self._path = os.path.join(self._folder, "front")
        self._listener = Listener(self._path, "AF_UNIX", backlog=jobs)
        self._callers: dict[str, queue.SimpleQueue[Connection | LineLost | None]] = {}
        self._requests = ThreadPoolExecutor(jobs, "line")
        threading.Thread(target=self._accept, name="switchboard", daemon=True).start()

    def close(self) -> None:
        """Take no more calls."""
        self._requests.shutdown()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, job: Job) -> Iterator[tuple[str, Any]]:
        """Answers of tensorrt_llm: ("tensors", name to array) and ("error", text); none after ``give_up`` before a line
        was free. Whoever leaves the loop early waits here for the end. Raises LineLost.
        """
        caller = self._callers[job.request_id] = queue.SimpleQueue()
        try:
            self._requests.submit(self._call, job.request_id)
            line = caller.get()
        finally:
            del self._callers[job.request_id]
        if isinstance(line, LineLost):
            raise line
        if line is None:
            return
        with line:
            answers = iter(line.recv, END)
            try:
                line.send(job)
                try:
                    yield from answers
                finally:
                    for _ in answers:
                        pass
            except (EOFError, OSError) as error:
                raise LineLost(f"the line to tensorrt_llm broke ({type(error).__name__})") from error

    def give_up(self, request_id: str) -> None:
        """Let the job wait for a line no longer; nothing happens where it has one, or is not here (yet)."""
        if (caller := self._callers.get(request_id)) is not None:
            caller.put(None)

    def _call(self, number: str) -> None:
        """Have a line call back, and wait for the end of the job: a request that is not decoupled cannot deadlock."""
        names = {"front": self._path, "job": number}
        request = pb_utils.InferenceRequest(
            model_name=_LINES, requested_output_names=["done"],
            inputs=[pb_utils.Tensor(name, np.array([[text]], dtype=object)) for name, text in names.items()],
        )  # fmt: skip
        try:
            response = request.exec()
            problem = response.error().message() if response.has_error() else None
        except pb_utils.TritonModelException as error:
            problem = str(error)
        caller = self._callers.get(number)
        if problem is not None and caller is not None:
            caller.put(LineLost(problem))

    def _accept(self) -> None:
        while True:
            try:
                line = self._listener.accept()
                caller = self._callers.get(line.recv())
            except EOFError:
                continue
            except OSError:
                return
            if caller is not None:
                caller.put(line)
            else:
                _refuse(line)


def _refuse(line: Connection) -> None:
    """The job of this line is not wanted any more."""
    try:
        with line:
            line.send(None)
    except OSError:
        pass
