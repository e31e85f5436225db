"""Triton model ``tensorrt_llm_bls``, the front: text to text over tensorrt_llm, many requests at the same time.

Rules that keep the Python backend of Triton 2.51 alive, each once a crash or a hang: inputs are copied in ``execute``,
before a thread gets them; ``send`` and ``is_cancelled`` of one sender happen under one lock and never after the final
flag; the final flag is sent in any case; the engine's responses come over lines (``lines.py``), other processes, and
only the watcher sends a request itself, one at a time. Text is made here and not by postprocessing, because a server
that is stopping takes no new request, not even one of its own models.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from lines import Job
from prompts import PromptMaker, RequestError
from text_tokenizer import TextTokenizer
from triton_config import flag, one_line, parameters

from .answers import Answers, Tensors
from .switchboard import LineLost, Switchboard
from .text_request import Arrays, TextRequest


class EngineRefusal(Exception):
    """tensorrt_llm answered with an error."""


class Call:
    """The client's side of one request: sends, closes, and knows whether anybody waits for what the engine makes."""

    def __init__(self, sender: Any) -> None:
        self.id = uuid.uuid4().hex  # towards the engine; clients may use an id twice
        self.satisfied = False  # what the engine still makes is not needed
        self._cancelled = self._closed = False
        self._sender, self._lock = sender, threading.Lock()

    def send(self, tensors: Tensors) -> None:
        """Send one response; nothing once the client has left."""
        self._send(pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()]))

    def fail(self, message: object, code: Any) -> None:
        """Send an error."""
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(one_line(message), code)))

    def _send(self, response: Any) -> None:
        with self._lock:
            if not (self._closed or self._cancelled):
                self._sender.send(response)

    def close(self) -> None:
        """Send the final flag."""
        with self._lock:
            self._closed = True
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def look(self) -> None:
        """Ask the server whether the client has left; for the watcher only."""
        with self._lock:
            if not (self._closed or self._cancelled):
                self._cancelled = self._sender.is_cancelled()

    @property
    def is_over(self) -> bool:
        """Whether the engine works for nobody: the answer is complete, or the watcher saw that the client has left."""
        return (self._cancelled or self.satisfied) and not self._closed


class TritonPythonModel:
    """A thread per request up to ``max_concurrency``; ``max_queue_size`` more may wait for one (0: any number)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer and start the watcher; a failure here fails the load of the model."""
        values = parameters(args)
        self._engine = values["tensorrt_llm_model_name"]
        self._excludes_input = flag(values["exclude_input_in_output"])
        self._period_s = int(values["cancellation_check_period_ms"]) / 1e3
        waiting = int(values["max_queue_size"])
        self._most_calls = int(values["max_concurrency"]) + waiting if waiting else None
        self._queue_limit = waiting
        self._tokenizer = TextTokenizer(
            values["tokenizer_dir"],
            add_special_tokens=flag(values["add_special_tokens"]),
            skip_special_tokens=flag(values["skip_special_tokens"]),
        )
        self._prompts = PromptMaker(self._tokenizer, values)
        outputs = [tensor["name"] for tensor in _declared_outputs(args)]
        self._wanted = ["output_ids", "sequence_length", *(name for name in outputs if name != "text_output")]
        self._switchboard = Switchboard(int(values["max_concurrency"]))
        self._calls: set[Call] = set()
        self._calls_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(int(values["max_concurrency"]), "request")
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Take the requests; their answers are sent by other threads."""
        for request in requests:
            call = Call(request.get_response_sender())
            arrays = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
            with self._calls_lock:
                full = self._most_calls is not None and len(self._calls) >= self._most_calls
                if not full:
                    self._calls.add(call)
            if full:
                call.fail(f"Exceeds maximum queue size of {self._queue_limit}", pb_utils.TritonError.UNAVAILABLE)
                call.close()
            else:
                self._threads.submit(self._serve, call, arrays)

    def finalize(self) -> None:
        """Let the requests in flight finish."""
        self._threads.shutdown(wait=True)
        self._stopping.set()
        self._wake.set()
        self._watcher.join()
        self._switchboard.close()

    def _serve(self, call: Call, arrays: Arrays) -> None:
        """One request from its inputs to the final flag, whatever happens."""
        try:
            if not call.is_over:  # a client that left while its request waited for a thread
                self._answer(call, arrays)
        except RequestError as error:
            call.fail(error, pb_utils.TritonError.INVALID_ARG)
        except (EngineRefusal, LineLost) as error:
            call.fail(error, pb_utils.TritonError.INTERNAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"tensorrt_llm_bls: {error!r}")
            call.fail(f"tensorrt_llm_bls failed ({type(error).__name__})", pb_utils.TritonError.INTERNAL)
        finally:
            with self._calls_lock:
                self._calls.discard(call)
            call.close()

    def _answer(self, call: Call, arrays: Arrays) -> None:
        request = TextRequest.read(arrays, excludes_input=self._excludes_input)
        prompt = self._prompts.make(
            arrays["text_input"],
            arrays["max_tokens"],
            stop_words=arrays.get("stop_words"),
            bad_words=arrays.get("bad_words"),
            bias_words=arrays.get("embedding_bias_words"),
            bias_weights=arrays.get("embedding_bias_weights"),
            end_id=arrays.get("end_id"),
            pad_id=arrays.get("pad_id"),
        )
        answers = Answers(self._tokenizer, prompt, request)
        for outputs in self._generate(call, request.engine_inputs(prompt)):
            response = answers.feed(outputs)
            if response is not None:
                call.send(response)
            if answers.all_stopped and not call.satisfied:
                call.satisfied = True
                self._wake.set()
        for response in answers.finish():
            call.send(response)
        if not call.satisfied and answers.missing:
            raise EngineRefusal(answers.missing)

    def _generate(self, call: Call, inputs: Tensors) -> Iterator[Tensors]:
        """The engine's responses; all are taken, also behind an error, so that none is left in the server."""
        refusal = None
        job = Job(self._engine, call.id, inputs, self._wanted)
        for kind, said in self._switchboard.ask(job):
            if kind == "error":
                refusal = refusal or EngineRefusal(said)
                call.satisfied = True
            elif refusal is None:
                yield said
        if refusal is not None:
            raise refusal

    def _stop_engine(self, call: Call) -> None:
        """Ask tensorrt_llm to end what runs under the call's id; the three lengths are only there to be present."""
        one = np.ones((1, 1), np.int32)
        inputs = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}
        request = pb_utils.InferenceRequest(
            model_name=self._engine, request_id=call.id, requested_output_names=["output_ids", "sequence_length"],
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
        )  # fmt: skip
        for _ in request.exec(decoupled=True):
            pass

    def _watch(self) -> None:
        """Stop what works or waits for nobody, again until it has ended."""
        while not self._stopping.is_set():
            self._wake.wait(self._period_s)
            self._wake.clear()
            self._stop_abandoned()

    def _stop_abandoned(self) -> None:
        # A method of its own: a variable that outlived the round would keep the last call and its sender alive.
        with self._calls_lock:
            calls = list(self._calls)
        for call in calls:
            try:
                call.look()
                if call.is_over:
                    self._switchboard.give_up(call.id)
                    self._stop_engine(call)
            except Exception as error:  # a stopping server takes no request; what runs ends by itself
                pb_utils.Logger.log_warn(f"tensorrt_llm_bls: cannot stop a request: {one_line(error)}")


def _declared_outputs(args: dict[str, str]) -> list[dict[str, Any]]:
    import json

    return list(json.loads(args["model_config"])["output"])
