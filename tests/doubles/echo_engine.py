"""A stand-in for the model ``tensorrt_llm`` that generates its own prompt, again and again, and nothing else.

So a test knows the tokens beforehand and can spell any text with them. It honours what the text model and the ensemble
use of the C++ backend (tests/data/triton_tensors.json): deltas when streaming, the whole otherwise, the prompt echo,
end id and stop lists, ``stop`` by request id, one response per batch row with ``batch_index``, ``sequence_index``, log
probs and counts on request, refusals, an error in place of what is left. test_doubles_engine.py holds all of that
against the CPU engine.

A ``seed`` of 13 breaks it after three steps, one of 14 before the first. ``temperature`` (above 1) is the number of
milliseconds that a step takes. Every request that ended is a JSON line in the file ``steps`` beside this one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ERROR = "Executor failed process requestId 7 due to the following error: bad place\nin /opt/secret/place.cpp:13"


class Refused(Exception):
    """The engine does not take a request."""


class TritonPythonModel:
    """Every request runs in a thread of its own, its sequences one after the other."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the file for the steps, and the engine's limits."""
        self._log = Path(args["model_repository"], "steps")
        values = {key: one["string_value"] for key, one in json.loads(args["model_config"])["parameters"].items()}
        self._limits = json.loads(Path(values["gpt_model_path"], "config.json").read_text())["build_config"]
        self._excludes_input = values["exclude_input_in_output"] == "true"
        self._stopped: set[str] = set()
        self._lock = threading.Lock()

    def execute(self, requests: list[Any]) -> None:
        """Copy the inputs and answer from threads."""
        for request in requests:
            inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
            call = _Call(request.request_id(), request.get_response_sender(), set(request.requested_output_names()))
            if inputs.get("stop", np.array([False])).any():
                self._stop(call)
            else:
                threading.Thread(target=self._run, args=(call, inputs)).start()

    def _stop(self, call: _Call) -> None:
        if not call.id:
            call.fail("A request with 'stop' must have the request id of the one that it stops")
            return
        with self._lock:
            self._stopped.add(call.id)
        call.send({}, final=True)

    def _run(self, call: _Call, inputs: dict[str, Any]) -> None:
        steps = 0
        try:
            sequences = [
                (row, number)
                for row in range(len(inputs["input_ids"]))
                for number in range(int(_value(inputs, row, "num_return_sequences", 1)))
            ]
            for row, _ in sequences:
                self._check(inputs, row)
            for place in sequences:
                steps += self._sequence(call, inputs, *place, is_last=place == sequences[-1])
        except (Refused, RuntimeError) as error:
            call.fail(str(error))
        finally:
            with self._log.open("a") as file:
                file.write(json.dumps({"id": call.id, "steps": steps, "stopped": call.id in self._stopped}) + "\n")

    def _check(self, inputs: dict[str, Any], row: int) -> None:
        prompt, wanted = len(_prompt(inputs, row)), int(_value(inputs, row, "request_output_len", 0))
        if prompt == 0:
            raise Refused("Prompt is empty: input_ids must have at least one token")
        if wanted < 1:
            raise Refused(f"request_output_len is {wanted}: it must be 1 or more")
        if prompt > self._limits["max_input_len"]:
            most = self._limits["max_input_len"]
            raise Refused(f"Prompt length ({prompt}) exceeds maximum input length ({most})")
        if prompt + wanted > self._limits["max_seq_len"]:
            most, lengths = (
                self._limits["max_seq_len"],
                f"Prompt length ({prompt}) and requested output length ({wanted})",
            )
            raise Refused(f"{lengths} together exceed the maximum sequence length ({most})")

    def _sequence(self, call: _Call, inputs: dict[str, Any], row: int, number: int, *, is_last: bool) -> int:
        """Answer with one sequence; how many tokens it was."""
        prompt, streaming = _prompt(inputs, row), bool(_value(inputs, row, "streaming", False))
        echo = [] if streaming or _value(inputs, row, "exclude_input_in_output", self._excludes_input) else prompt
        made: list[int] = []
        for new, ends in self._tokens(call, inputs, row, prompt):
            made += new
            if streaming or ends:
                told = new if streaming else made
                outputs = _outputs(inputs, row, number, prompt=prompt, echo=echo, new=told, total=sum(made))
                call.send(outputs, final=ends and is_last)
        return len(made)

    def _tokens(self, call: _Call, inputs: dict[str, Any], row: int, prompt: list[int]) -> Iterator[tuple[Any, bool]]:
        """What each step gives, and whether it is the last; the end id ends and is not given."""
        seed, wait_s = _value(inputs, row, "seed", 0), float(_value(inputs, row, "temperature", 0)) / 1e3
        length, words = int(_value(inputs, row, "request_output_len", 0)), _words(inputs, row)
        made: list[int] = []
        while True:
            if seed == 14 or (seed == 13 and len(made) == 3):
                raise RuntimeError(ERROR)
            time.sleep(wait_s)
            token = prompt[len(made) % len(prompt)]
            at_end = token == _value(inputs, row, "end_id", -1) and len(made) >= _value(inputs, row, "min_tokens", 0)
            if at_end or self._is_stopped(call):
                yield [], True
                return
            made.append(token)
            is_last = len(made) == length or any(made[-len(word) :] == word for word in words)
            yield [token], is_last
            if is_last:
                return

    def _is_stopped(self, call: _Call) -> bool:
        with self._lock:
            if call.is_cancelled():
                self._stopped.add(call.id)
            return call.id in self._stopped


class _Call:
    """The client's side of a request."""

    def __init__(self, request_id: str, sender: Any, wanted: set[str]) -> None:
        self.id, self._sender, self._wanted = request_id, sender, wanted

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())

    def send(self, outputs: dict[str, Any], *, final: bool) -> None:
        tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items() if name in self._wanted]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def fail(self, message: str) -> None:
        """End the request with an error: nothing may follow one."""
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
        self._sender.send(response, flags=FINAL)


def _value(inputs: dict[str, Any], row: int, name: str, default: Any) -> Any:
    return inputs[name].reshape(-1)[row] if name in inputs else default


def _prompt(inputs: dict[str, Any], row: int) -> list[int]:
    return list(map(int, inputs["input_ids"][row].reshape(-1)[: int(_value(inputs, row, "input_lengths", 0))]))


def _words(inputs: dict[str, Any], row: int) -> list[list[int]]:
    """Row 0 all ids, row 1 where each word ends, then -1."""
    if "stop_words_list" not in inputs or not inputs["stop_words_list"].size:
        return []
    ids, ends = inputs["stop_words_list"][row].tolist()
    ends = [0, *(end for end in ends if end >= 0)]
    return [ids[start:end] for start, end in pairwise(ends)]


def _outputs(
    inputs: dict[str, Any], row: int, number: int, *, prompt: list[int], echo: list[int], new: list[int], total: int
) -> dict[str, Any]:
    """Tensors of one response, with the batch axis (always 1); log probs are the ids with a minus."""
    ids = echo + new
    outputs: dict[str, Any] = {
        "output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(ids)]], np.int32),
    }
    if len(inputs["input_ids"]) > 1:
        outputs["batch_index"] = np.array([[row]], np.int32)
    if _value(inputs, row, "num_return_sequences", 1) > 1:
        outputs["sequence_index"] = np.array([[number]], np.int32)
    if _value(inputs, row, "return_log_probs", False):
        outputs["output_log_probs"] = -np.array([[new]], np.float32).reshape(1, 1, -1)
        outputs["cum_log_probs"] = np.array([[-total]], np.float32)
    if _value(inputs, row, "return_num_input_tokens", False):
        outputs["num_input_tokens"] = np.array([[len(prompt)]], np.int32)
    if _value(inputs, row, "return_num_output_tokens", False):
        outputs["num_output_tokens"] = np.array([[len(new)]], np.int32)
    return outputs
