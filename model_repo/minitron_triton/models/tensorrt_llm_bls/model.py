"""Triton model ``tensorrt_llm_bls``, the text model: text to text over tensorrt_llm, many requests at the same time.

One instance; an event loop in a thread of its own answers all requests, each over a gRPC stream to this very server
(``text/engine.py`` says why). Text is made here and not by postprocessing: a server that is stopping takes no new
request, not even of its own.

Beyond upstream's tensors there is ``stop``, with tensorrt_llm's meaning: a client that ends its request so, and reads
its stream to the end, spares the server a cancelled gRPC stream (``text/engine.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # what lies beside this file comes before what is installed

from reply import Reply
from triton_config import flag, one_line, parameters

from minitron.text import packages

packages.check()  # before what needs them is imported

from minitron.text import trace_context
from minitron.text.engine import Address, EngineCallError, EngineClient
from minitron.text.errors import RequestError
from minitron.text.pace import Pace
from minitron.text.prompts import PromptMaker
from minitron.text.service import TextService
from minitron.text.tensors import Arrays, Tensors
from minitron.text.tokenizer import TextTokenizer

#: Triton's one thread of all gRPC streams can deadlock over a client that leaves (2.51), without a word, and the server
#: still calls itself ready. So often it is asked, so long it may take, and so often in a row it may fail to answer.
_ASK_EVERY_S, _PATIENCE_S, _MOST_SILENCES = 5.0, 15.0, 2


class _Call:
    """One request's client, for the loop's thread alone."""

    def __init__(self, request_id: str, reply: Reply, trace: trace_context.Headers) -> None:
        self.request_id, self.trace = request_id, trace
        self.task: asyncio.Task[None] | None = None
        self._reply = reply
        self._is_wanted = True

    def send(self, tensors: Tensors) -> None:
        """Send one response."""
        if self._is_wanted:
            self._reply.send(
                pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])
            )

    def close(self, error: Any = None) -> None:
        """Send the final flag, with ``error`` (a TritonError) in the same call where there is one."""
        self._reply.close(None if error is None else pb_utils.InferenceResponse(error=error))

    def end_if_left(self) -> None:
        """End the request where its client has left."""
        if self._is_wanted and self._reply.has_left():
            self.end()

    def end(self) -> None:
        """Nobody wants more of the answer."""
        if self._is_wanted and self.task is not None:
            self._is_wanted = False
            asyncio.get_running_loop().call_soon(self.task.cancel)  # not now: one that has not begun would never close


class TritonPythonModel:
    """Up to ``max_concurrency`` and ``max_queue_size`` requests together; those that the engine has no room for wait
    there (``max_queue_size`` 0: any number)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer and start the loop; a failure here fails the load of the model, with a sentence."""
        values = parameters(args)
        self._period_s = int(values["cancellation_check_period_ms"]) / 1e3
        self._queue_limit = int(values["max_queue_size"])
        self._most_calls = int(values["max_concurrency"]) + self._queue_limit if self._queue_limit else None
        self._calls: set[_Call] = set()
        tokenizer = TextTokenizer(
            values["tokenizer_dir"],
            add_special_tokens=flag(values["add_special_tokens"]),
            skip_special_tokens=flag(values["skip_special_tokens"]),
        )
        outputs = [tensor["name"] for tensor in json.loads(args["model_config"])["output"]]
        outputs.remove("text_output")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._engine: EngineClient
        self._engine, self._pace = self._run(_connect(values))
        self._text = TextService(
            tokenizer, PromptMaker(tokenizer, values), self._engine, outputs,
            excludes_input=flag(values["exclude_input_in_output"]), pace=self._pace,
        )  # fmt: skip
        self._has_been_asked = False
        self._watchers = [asyncio.run_coroutine_threadsafe(work, self._loop) for work in (self._watch(), self._heed())]
        self._restarts = _tell_restarts(args["model_name"])
        family = pb_utils.MetricFamily
        self._requests = family("minitron_text_requests", "Requests that the text model works on", family.GAUGE)
        self._in_work = self._requests.Metric(labels={"model": args["model_name"]})

    def execute(self, requests: list[Any]) -> None:
        """Copy the requests; their answers are sent by the loop."""
        for request in requests:
            arrays = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
            call = _Call(request.request_id(), Reply(request.get_response_sender()), _trace_of(request))
            self._loop.call_soon_threadsafe(self._begin, call, arrays)

    def finalize(self) -> None:
        """End the loop; Triton calls it when no request is in flight."""
        for watcher in self._watchers:
            watcher.cancel()
        self._loop.call_soon_threadsafe(self._pace.stop)
        self._run(self._engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _begin(self, call: _Call, arrays: Arrays) -> None:
        self._has_been_asked = True
        if "stop" in arrays and arrays["stop"].any():
            self._stop(call)
            return
        if self._most_calls is not None and len(self._calls) >= self._most_calls:
            full = f"Exceeds maximum queue size of {self._queue_limit}"
            call.close(_error(full, pb_utils.TritonError.UNAVAILABLE))
            return
        self._calls.add(call)
        self._in_work.set(len(self._calls))
        call.task = self._loop.create_task(self._serve(call, arrays))

    def _stop(self, call: _Call) -> None:
        """End the requests that have this one's id, and answer with nothing, as tensorrt_llm does."""
        if not call.request_id:
            wrong = "a request with 'stop' must have the request id of the one that it stops"
            call.close(_error(wrong, pb_utils.TritonError.INVALID_ARG))
            return
        for other in self._calls:
            if other.request_id == call.request_id:
                other.end()
        call.close()

    async def _serve(self, call: _Call, arrays: Arrays) -> None:
        """One request from its inputs to the final flag, whatever happens."""
        trace_context.CURRENT.set(call.trace)  # of this task alone
        error = None
        try:
            async with contextlib.aclosing(self._text.answer(arrays)) as answer:
                async for tensors in answer:
                    call.send(tensors)
        except asyncio.CancelledError:
            pass  # the client has left
        except RequestError as wrong:
            error = _error(wrong, pb_utils.TritonError.INVALID_ARG)
        except EngineCallError as failure:
            error = _error(failure, pb_utils.TritonError.INTERNAL)
        except Exception as fault:
            pb_utils.Logger.log_error(f"tensorrt_llm_bls: {fault!r}")
            error = _error(f"tensorrt_llm_bls failed ({type(fault).__name__})", pb_utils.TritonError.INTERNAL)
        finally:
            self._calls.discard(call)
            self._in_work.set(len(self._calls))
            call.close(error)

    async def _watch(self) -> None:
        """Look for clients that left."""
        while True:
            await asyncio.sleep(self._period_s)
            for call in list(self._calls):
                call.end_if_left()

    async def _heed(self) -> None:
        """End this process when the server has ceased to answer gRPC streams: its supervisor takes that for a crash.

        Not before the first request: while other models load the server does not listen, and a channel that was refused
        fails what comes in the two seconds after, the first request of 'minitron serve' among it.
        """
        silences = 0
        while silences < _MOST_SILENCES:
            await asyncio.sleep(_ASK_EVERY_S)
            silences = silences + 1 if self._has_been_asked and await self._engine.is_silent(_PATIENCE_S) else 0
        print("tensorrt_llm_bls: the server answers no gRPC stream any more", file=sys.stderr, flush=True)
        os._exit(1)


async def _connect(values: dict[str, str]) -> tuple[EngineClient, Pace]:
    """What has to be made in the loop."""
    return EngineClient(values["tensorrt_llm_model_name"], Address.of(values)), Pace()


def _trace_of(request: Any) -> trace_context.Headers:
    """The span that Triton has made for this request, whose child the engine's is to be; none without tracing."""
    return trace_context.of_triton(request.trace().get_context())


def _error(message: object, code: Any) -> Any:
    return pb_utils.TritonError(one_line(message), code)


def _tell_restarts(model: str) -> Any:
    """A counter of how often the supervisor started this server again; kept, or the server would drop it."""
    family = pb_utils.MetricFamily(
        "minitron_server_restarts_total", "Starts of this server after a crash", pb_utils.MetricFamily.COUNTER
    )
    counter = family.Metric(labels={"model": model})
    counter.increment(int(os.environ.get("MINITRON_RESTARTS", "0")))
    return family, counter
