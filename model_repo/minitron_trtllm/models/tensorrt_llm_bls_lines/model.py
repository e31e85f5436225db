"""Triton model ``tensorrt_llm_bls_lines``: each instance is a line of tensorrt_llm_bls to the engine.

``lines.py`` says why they are needed and how they talk. Only the front sends requests to this model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from lines import END, Job
from triton_config import one_line

#: Responses of the last jobs. The backend drops its own reference to them in a thread that does not hold the GIL; were
#: it the last one, their arrays would be freed there, and the process crashed every few hundred requests.
_kept: deque[Any] = deque(maxlen=4)


class TritonPythonModel:
    """Everything happens in one thread: that is the point of it."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Call the front for the job of each request, and carry it to its end."""
        return [_answer(request) for request in requests]


def _answer(request: Any) -> Any:
    front, number = (pb_utils.get_input_tensor_by_name(request, name).as_numpy().item() for name in ("front", "job"))
    try:
        with Client(front.decode(), "AF_UNIX") as connection:
            connection.send(number.decode())
            job = connection.recv()
            if job is not None:
                _carry(job, connection)
        return pb_utils.InferenceResponse([pb_utils.Tensor("done", np.array([[True]]))])
    except (OSError, EOFError) as error:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the front cannot be reached ({error})"))


def _carry(job: Job, connection: Connection) -> None:
    """One request to its end, whatever happens; raises OSError only after that, where the front has gone meanwhile."""
    lost = None
    for answer in _answers(job):
        try:
            connection.send(answer)
        except OSError as error:
            lost = error
    if lost:
        raise lost


def _answers(job: Job) -> Iterator[tuple[str, Any]]:
    try:
        request = pb_utils.InferenceRequest(
            model_name=job.model, request_id=job.request_id, requested_output_names=job.wanted,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in job.inputs.items()],
            parameters={"no_late_errors": True},  # our CPU engine obeys: an error behind a response would get lost
        )  # fmt: skip
        responses = request.exec(decoupled=True)
        _kept.append(responses)
        for response in responses:
            if response.has_error():
                yield "error", response.error().message()
            else:
                yield "tensors", {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    except pb_utils.TritonModelException as error:
        yield "error", one_line(error)
    yield END
