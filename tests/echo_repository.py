"""A model repository with one small Python model, for tests of the server itself: it loads in no time.

``echo`` sends ``max_tokens`` responses "0 ", "1 " …, 50 ms apart, and a final flag of its own, as the text model does.
A prompt "wait 3" waits three seconds before the first, as one behind a busy engine.
"""

from __future__ import annotations

from pathlib import Path

from minitron.artifacts import manifest

CONFIG = """\
name: "echo"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
MODEL = """\
import threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def finalize(self):
        {finalize}

    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy().reshape(-1)[0])
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
            wait_s = float(text.removeprefix("wait ")) if text.startswith("wait ") else 0
            threading.Thread(target=self.answer, args=(request.get_response_sender(), count, wait_s)).start()

    def answer(self, sender, count, wait_s):
        time.sleep(wait_s)
        for number in range(count):
            time.sleep(0.05)
            text = np.array([f"{{number}} "], dtype=object)
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def write(
    folder: Path, *, initialize: str = "pass", finalize: str = "pass", config: str = CONFIG, **details: object
) -> Path:
    """Write the repository; the model does ``initialize`` first and ``finalize`` last, ``details`` overrides the
    manifest's."""
    version = folder / "echo" / "1"
    version.mkdir(parents=True)
    (folder / "echo" / "config.pbtxt").write_text(config)
    (version / "model.py").write_text(MODEL.format(initialize=initialize, finalize=finalize))
    plain = {"backend": "python", "models": ["echo"], "front": "echo", "root": str(folder), "world_size": 1,
             "bls_max_concurrency": 64, "shm_bytes": 2 << 30}  # fmt: skip
    manifest.write(
        folder, "repository", manifest.Input("engine", "somewhere", "0"), arguments={}, details=plain | details
    )
    return folder


def add_model(folder: Path, name: str, initialize: str) -> None:
    """Put another model like ``echo`` beside it."""
    version = folder / name / "1"
    version.mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(CONFIG.replace('"echo"', f'"{name}"'))
    (version / "model.py").write_text(MODEL.format(initialize=initialize, finalize="pass"))
