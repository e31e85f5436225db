"""The CPU engine as the Triton model ``tensorrt_llm``, in the manners of TensorRT-LLM's C++ backend.

``execute`` only takes requests in; responses are sent by the engine's thread. A second thread looks for clients that
went away and feeds the metrics.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # what lies beside this file comes before what is installed

from reply import Reply

from .answers import Call, error_response
from .cpu_engine import Engine
from .generation_request import Refused
from .metrics import Metrics
from .parameters import Parameters
from .request_tensors import read

log = logging.getLogger(__name__)


class TritonPythonModel:
    """What Triton's Python backend creates, calls and finalizes."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine; raises TritonModelException with one line on what is wrong."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_TritonLog()])
        config = json.loads(args["model_config"])
        try:
            self._parameters = Parameters.of(config)
            self._engine = Engine.load(
                self._parameters.engine_folder,
                kv_cache_tokens=self._parameters.kv_cache_tokens,
                reuse_kv_cache=self._parameters.reuse_kv_cache,
                max_queue=self._parameters.max_queue,
                prompt_lookup=self._parameters.prompt_lookup,
            )
        except Exception as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {' '.join(str(error).split())}") from None
        self._metrics = Metrics(args["model_name"], args["model_version"])
        self._calls: dict[int, Call] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Take requests in; every one is answered through its response sender, the last answer marked final."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            try:
                self._take(request, reply)
            except Refused as error:
                reply.close(error_response(str(error)))
            except Exception as error:
                log.exception("a request could not be taken in")
                reply.close(error_response(f"The request could not be read ({type(error).__name__})"))

    def finalize(self) -> None:
        """Stop the threads; Triton calls it when no request is in flight any more."""
        self._stopping.set()
        self._watcher.join()
        self._engine.close()
        self._metrics.close()
        self._calls.clear()

    def _take(self, request: Any, reply: Reply) -> None:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        request_id = request.request_id()
        if "stop" in tensors and tensors["stop"].any():
            self._stop(request_id, reply)
            return
        wanted = read(
            tensors,
            decoupled=self._parameters.decoupled,
            exclude_input=self._parameters.exclude_input_in_output,
            own_end_ids=self._parameters.end_ids,
        )
        requested = frozenset(request.requested_output_names())
        call = Call(request_id, reply, wanted, requested, engine=self._engine, metrics=self._metrics)
        with self._lock:
            if request_id and any(other.request_id == request_id for other in self._live_calls()):
                raise Refused(f"Request id {request_id!r} must be unique: the request that has it is not over")
            self._calls[id(call)] = call
        call.start()

    def _stop(self, request_id: str, reply: Reply) -> None:
        """Cancel the request that has this id, and answer with nothing, whether there is one or not."""
        if not request_id:
            raise Refused("A request with 'stop' must have the request id of the one that it stops")
        for call in self._live_calls():
            if call.request_id == request_id:
                call.cancel()
        reply.close(pb_utils.InferenceResponse([]))

    def _live_calls(self) -> list[Call]:
        return [call for call in list(self._calls.values()) if not call.is_done]

    def _watch(self) -> None:
        """Cancel what nobody waits for any more, and keep the metrics fresh."""
        pause = min(self._parameters.cancellation_check_s, self._parameters.stats_check_s)
        next_stats = next_check = 0.0
        while not self._stopping.wait(pause):
            now = time.monotonic()
            try:
                if now >= next_check:
                    next_check = now + self._parameters.cancellation_check_s
                    self._cancel_abandoned()
                if now >= next_stats:
                    next_stats = now + self._parameters.stats_check_s
                    self._metrics.update(self._engine.stats())
            except Exception:
                log.exception("the watcher had an error and goes on")

    def _cancel_abandoned(self) -> None:
        with self._lock:
            self._calls = {key: call for key, call in self._calls.items() if not call.is_done}
            calls = list(self._calls.values())
        for call in calls:
            call.cancel_if_abandoned()


class _TritonLog(logging.Handler):
    """Hands Python's log records to Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        level = "error" if record.levelno >= logging.ERROR else "warn" if record.levelno >= logging.WARNING else "info"
        getattr(pb_utils.Logger, f"log_{level}")(self.format(record))
