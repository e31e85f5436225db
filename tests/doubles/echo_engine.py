"""A stand-in for the model ``tensorrt_llm`` that generates its own prompt, again and again, and nothing else.

So a test knows the tokens beforehand and can spell any text with them. It honours what the BLS and the ensemble use of
the C++ backend (tests/data/triton_tensors.json): deltas when streaming, the whole otherwise, the prompt echo, end id,
``stop`` by request id, one response per batch row with ``batch_index``, ``sequence_index``, log probs and counts on
request, an empty final response. A ``seed`` of 13 breaks it after three steps. ``temperature`` (above 1) is the number
of milliseconds that a step takes. Every request that ended is a JSON line in the file ``steps`` beside this one.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ERROR = "Executor failed process requestId 7 due to the following error: bad place\nin /opt/secret/place.cpp:13"


class TritonPythonModel:
    """Every sequence of every request runs in a thread of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the file for the steps."""
        self._log = Path(args["model_repository"], "steps")
        self._stopped: set[str] = set()
        self._lock = threading.Lock()

    def execute(self, requests: list[Any]) -> None:
        """Copy the inputs and answer from threads."""
        for request in requests:
            inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
            sender = request.get_response_sender()
            if inputs.get("stop", np.array([False])).any():
                with self._lock:
                    self._stopped.add(request.request_id())
                sender.send(flags=FINAL)
            else:
                threading.Thread(target=self._run, args=(request.request_id(), inputs, sender)).start()

    def _run(self, request_id: str, inputs: dict[str, Any], sender: Any) -> None:
        count = int(inputs.get("num_return_sequences", np.array([1])).reshape(-1)[0])
        rows = inputs["input_ids"].shape[0]
        steps = 0
        try:
            if "seed" in inputs and inputs["seed"].reshape(-1)[0] == 14:
                raise RuntimeError(ERROR)
            for row in range(rows):
                for number in range(count):
                    place = {} if rows == 1 else {"batch_index": row}
                    place |= {} if count == 1 else {"sequence_index": number}
                    steps += self._sequence(request_id, inputs, row, place, sender)
            sender.send(flags=FINAL)
        except RuntimeError as error:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            sender.send(response, flags=FINAL)
        finally:
            with self._log.open("a") as file:
                file.write(
                    json.dumps({"id": request_id, "steps": steps, "stopped": request_id in self._stopped}) + "\n"
                )

    def _sequence(self, request_id: str, inputs: dict[str, Any], row: int, place: dict[str, int], sender: Any) -> int:
        def value(name: str, default: Any) -> Any:
            return inputs[name].reshape(-1)[row] if name in inputs else default

        prompt = inputs["input_ids"][row, : int(value("input_lengths", 0))].tolist()
        streaming, wait_s = bool(value("streaming", False)), float(value("temperature", 0)) / 1e3
        made: list[int] = []
        for step in range(int(value("request_output_len", 0))):
            if value("seed", 0) == 13 and step == 3:
                raise RuntimeError(ERROR)
            time.sleep(wait_s)
            if request_id in self._stopped or sender.is_cancelled():
                with self._lock:
                    self._stopped.add(request_id)
                break
            made.append(prompt[step % len(prompt)])
            if streaming:
                self._send(sender, made[-1:], prompt, inputs, place)
            if made[-1] == value("end_id", -1):
                break
        if not streaming:
            ids = made if value("exclude_input_in_output", False) else prompt + made
            self._send(sender, ids, prompt, inputs, place)
        return len(made)

    def _send(
        self, sender: Any, ids: list[int], prompt: list[int], inputs: dict[str, Any], place: dict[str, int]
    ) -> None:
        outputs: dict[str, Any] = {
            "output_ids": np.array([[ids]], np.int32),
            "sequence_length": np.array([[len(ids)]], np.int32),
            **{name: np.array([[number]], np.int32) for name, number in place.items()},
        }
        if "return_log_probs" in inputs:
            outputs["output_log_probs"] = -np.array([[ids]], np.float32)
            outputs["cum_log_probs"] = np.array([[-sum(ids)]], np.float32)
        if "return_num_input_tokens" in inputs:
            outputs["num_input_tokens"] = np.array([[len(prompt)]], np.int32)
        if "return_num_output_tokens" in inputs:
            outputs["num_output_tokens"] = np.array([[len(ids)]], np.int32)
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()]))
