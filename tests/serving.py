"""A real Triton server on a repository, as a fixture of several tests needs it, and one gRPC stream after another."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from conftest import ROOMS, ROOT


@contextlib.contextmanager
def server(repository: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """Run ``minitron serve`` on free ports; yields its state document (urls: grpc, http, metrics; pid) and ``log``.

    State and log lie in a folder of this server's own: others serve the same repository, and stop what is theirs.
    """
    own = Path(tempfile.mkdtemp(prefix=f"{repository.name}-", dir=repository.parent))
    words = [sys.executable, "-m", "minitron_cli", "serve", str(repository), "--json"]
    words += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    words += ["--state", str(own / "state"), *flags]
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    log = own / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"PYTHONPATH": rooms}
        )
        try:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    break
            assert text, f"the server did not start:\n{log.read_text()[-3000:]}"
            yield json.loads(text) | {"process": process, "log": log}
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(60)


class Stream:
    """One gRPC stream: ``ask`` sends a request, ``responses`` gives what comes until its final flag."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.client = triton.InferenceServerClient(url)
        self._arrived: queue.Queue[Any] = queue.Queue()
        self.client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def ask(self, model: str, request_id: str = "", **inputs: Any) -> None:
        """Send a request; values become tensors [1, n] of the type that they have."""
        tensors = [_tensor(name, value) for name, value in inputs.items()]
        self.client.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)

    @property
    def has_answer(self) -> bool:
        """Whether ``next`` has something at once."""
        return not self._arrived.empty()

    def next(self, timeout_s: float = 60) -> tuple[dict[str, Any], str | None, bool]:
        """Outputs, error and final flag of the next response."""
        result, error = self._arrived.get(timeout=timeout_s)
        if error is not None:
            return {}, error.message(), True
        raw = result.get_response()
        outputs = {output.name: result.as_numpy(output.name) for output in raw.outputs}
        return outputs, None, raw.parameters["triton_final_response"].bool_param

    def responses(self, model: str, **inputs: Any) -> list[dict[str, Any]]:
        """All responses with outputs to one request; an error becomes an AssertionError."""
        self.ask(model, **inputs)
        found = []
        while True:
            outputs, error, final = self.next()
            assert error is None, error
            if outputs:
                found.append(outputs)
            if final:
                return found

    def infer(self, model: str, **inputs: Any) -> dict[str, Any]:
        """Outputs of a model that answers once."""
        result = self.client.infer(model, [_tensor(name, value) for name, value in inputs.items()])
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def error(self, model: str, **inputs: Any) -> str:
        """The error that a request is answered with, asked on a stream of its own."""
        own = Stream(self._url)
        try:
            own.ask(model, **inputs)
            while True:
                _, error, final = own.next()
                if error is not None:
                    return str(error)
                assert not final, "the request was answered without an error"
        finally:
            own.close()

    def another(self) -> Stream:
        """A second stream to the same server."""
        return Stream(self._url)

    def close(self, *, cancel: bool = False) -> None:
        """End the stream; with ``cancel`` the server is told that nobody listens."""
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def _tensor(name: str, value: Any) -> triton.InferInput:
    if isinstance(value, (str, bytes)) or (isinstance(value, list) and isinstance(value[0], (str, bytes))):
        items = value if isinstance(value, list) else [value]
        array = np.array([[item.encode() if isinstance(item, str) else item for item in items]], dtype=object)
        kind = "BYTES"
    else:
        array, kind = _numbers(name, value)
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


def _numbers(name: str, value: Any) -> tuple[Any, str]:
    if isinstance(value, np.ndarray):
        array = value
    else:
        kind: Any = np.bool_ if isinstance(value, bool) else np.float32 if isinstance(value, float) else np.int32
        array = np.array([[np.uint64(value) if name == "seed" else value]], dtype=np.uint64 if name == "seed" else kind)
    names = {
        "int32": "INT32",
        "float32": "FP32",
        "bool": "BOOL",
        "uint64": "UINT64",
        "object": "BYTES",
        "int64": "INT64",
    }
    return array, names[array.dtype.name]


def text_of(responses: list[dict[str, Any]]) -> str:
    """The joined ``text_output`` of a single sequence."""
    return b"".join(response["text_output"][0] for response in responses).decode()
