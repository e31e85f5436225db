"""Triton model ``tensorrt_llm`` over TensorRT-LLM's LLM API (PyTorch path): text to text, no engine, no other models.

model.yaml beside this file: ``triton_config`` is for this model, every other key goes to the constructor of ``LLM``.
Tensors are those of upstream's llmapi model: one prompt per request, and a streamed ``text_output`` is all of the text
so far. A request that was cancelled ends with the code CANCELLED.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml
from reply import Reply
from triton_config import one_line

#: Inputs that are arguments of SamplingParams: name here, name there.
_SAMPLING = {
    "sampling_param_best_of": "best_of",
    "sampling_param_temperature": "temperature",
    "sampling_param_top_k": "top_k",
    "sampling_param_top_p": "top_p",
    "sampling_param_frequency_penalty": "frequency_penalty",
    "sampling_param_presence_penalty": "presence_penalty",
    "sampling_param_max_tokens": "max_tokens",
    "sampling_param_seed": "seed",
    "sampling_param_return_perf_metrics": "return_perf_metrics",
}
_TIMES = {  # name here, attribute of the request's timing metrics
    "arrival_time_ns": "arrival_time",
    "first_scheduled_time_ns": "first_scheduled_time",
    "first_token_time_ns": "first_token_time",
    "last_token_time_ns": "last_token_time",
}


class TritonPythonModel:
    """Requests run side by side in one event loop; ``execute`` only hands them over."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Tell Triton the batch size and whether there is more than one response, from model.yaml."""
        settings = _config().get("triton_config", {})
        auto_complete_model_config.set_max_batch_size(int(settings.get("max_batch_size", 0)))
        auto_complete_model_config.set_model_transaction_policy({"decoupled": bool(settings.get("decoupled", False))})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; a failure here fails the load in Triton."""
        from tensorrt_llm import LLM, SamplingParams

        config = _config()
        settings = config.pop("triton_config", {})
        self._decoupled = bool(settings.get("decoupled", False))
        self._period_s = int(settings.get("cancellation_check_period_ms", 100)) / 1e3
        self._sampling_params = SamplingParams
        self._llm = LLM(**config)
        self._running: dict[str, Any] = {}  # by request id
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Copy the inputs; the answers are sent from the event loop."""
        for request in requests:
            inputs = {tensor.name(): np.array(tensor.as_numpy()).reshape(-1) for tensor in request.inputs()}
            serving = self._serve(request.request_id(), inputs, Reply(request.get_response_sender()))
            asyncio.run_coroutine_threadsafe(serving, self._loop)

    def finalize(self) -> None:
        """Give the GPU back."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._llm.shutdown()

    async def _serve(self, request_id: str, inputs: dict[str, Any], reply: Reply) -> None:
        """One request from its inputs to the final flag, whatever happens."""
        last = None
        try:
            if inputs.get("stop", np.array([False])).any():
                self._stop(request_id)
            else:
                last = await self._answer(request_id, inputs, reply)
        except ValueError as error:
            last = _error(one_line(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(f"tensorrt_llm: {error!r}")
            last = _error(one_line(error), pb_utils.TritonError.INTERNAL)
        finally:
            reply.close(last)

    def _stop(self, request_id: str) -> None:
        if not request_id:
            raise ValueError("a request with 'stop' must have the request id of the one that it stops")
        if request_id in self._running:
            self._running[request_id].abort()

    async def _answer(self, request_id: str, inputs: dict[str, Any], reply: Reply) -> Any:
        """Send the answer but for its last response, which is returned; None where all is sent."""
        if inputs["text_input"].size != 1:
            raise ValueError(f"text_input has {inputs['text_input'].size} prompts, and one is needed")
        prompt = _text(inputs["text_input"][0])
        streams = bool(inputs.get("streaming", np.array([False]))[0])
        if streams and not self._decoupled:
            raise ValueError("streaming needs a decoupled model (triton_config in model.yaml)")
        echo = "" if bool(inputs.get("sampling_param_exclude_input_from_output", np.array([True]))[0]) else prompt
        result = self._llm.generate_async(prompt, sampling_params=self._parameters(inputs), streaming=streams)
        if request_id:
            self._running[request_id] = result
        watcher = asyncio.ensure_future(self._watch(result, reply))
        try:
            if streams:
                async for output in result:
                    reply.send(_response(output, inputs, echo))
                last = None
            else:
                last = _response(await result, inputs, echo)
        finally:
            watcher.cancel()
            self._running.pop(request_id, None)
        return _error("the request was cancelled", pb_utils.TritonError.CANCELLED) if result.aborted() else last

    async def _watch(self, result: Any, reply: Reply) -> None:
        """Abort the generation once the client has left."""
        while not reply.has_left():
            await asyncio.sleep(self._period_s)
        result.abort()

    def _parameters(self, inputs: dict[str, Any]) -> Any:
        values = {theirs: inputs[ours][0].item() for ours, theirs in _SAMPLING.items() if ours in inputs}
        if "sampling_param_stop" in inputs:
            values["stop"] = [_text(word) for word in inputs["sampling_param_stop"] if word]
        if inputs.get("return_cumulative_logprob", np.array([False]))[0]:
            values["logprobs"] = 1
        return self._sampling_params(**values)


def _config() -> dict[str, Any]:
    name = os.environ.get("LLM_CONFIG_PATH", "model.yaml")
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), encoding="utf-8") as file:
        return dict(yaml.safe_load(file))


def _text(value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not valid UTF-8 (at byte {error.start})") from None


def _response(output: Any, inputs: dict[str, Any], echo: str) -> Any:
    """All sequences of one result; what was not asked for is left out."""

    def asked(name: str) -> bool:
        return bool(inputs.get(name, np.array([False]))[0])

    sequences = output.outputs
    tensors = {"text_output": _strings([echo + sequence.text for sequence in sequences])}
    if asked("return_finish_reason"):
        tensors["finish_reason"] = _strings([str(sequence.finish_reason) for sequence in sequences])
    if asked("return_stop_reason"):
        tensors["stop_reason"] = _strings([str(sequence.stop_reason) for sequence in sequences])
    if asked("return_cumulative_logprob"):
        values = [sequence.cumulative_logprob or 0.0 for sequence in sequences]
        tensors["cumulative_logprob"] = np.array(values, np.float32)
    if asked("sampling_param_return_perf_metrics"):
        tensors |= _performance(sequences[0])
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])


def _performance(sequence: Any) -> dict[str, Any]:
    """Times of the request in ns of the executor's own clock, where the LLM API gives them."""
    metrics = getattr(sequence, "request_perf_metrics", None)
    if metrics is None:
        return {}
    timing, cache = metrics.timing_metrics, metrics.kv_cache_metrics
    found: dict[str, Any] = {
        name: np.array([int(getattr(timing, attribute).total_seconds() * 1e9)], np.int64)
        for name, attribute in _TIMES.items()
    }
    for name, attribute in (
        ("kv_cache_reused_block", "num_reused_blocks"),
        ("kv_cache_missed_block", "num_missed_blocks"),
        ("kv_cache_alloc_new_blocks", "num_new_allocated_blocks"),
        ("kv_cache_alloc_total_blocks", "num_total_allocated_blocks"),
    ):
        found[name] = np.array([getattr(cache, attribute)], np.int32)
    return found


def _strings(texts: list[str]) -> Any:
    return np.array([text.encode() for text in texts], dtype=object)


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
