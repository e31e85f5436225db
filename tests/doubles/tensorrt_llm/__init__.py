"""A stand-in for the package ``tensorrt_llm``: the part of the LLM API that our llmapi model uses, strict about it.

Arguments outside the reviewed lists (from tensorrt_llm/llmapi/llm_args.py and sampling_params.py, 1.2) raise. The
"model" says the words of its prompt again, one every ``temperature`` milliseconds where that is above 1; the word
``</s>`` is its end token. Neither that nor a stop string is in the text, and the reason comes with the last of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from types import SimpleNamespace
from typing import Any

END = "</s>"
LLM_ARGUMENTS = {
    "model", "backend", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_input_len",
    "max_seq_len", "max_num_tokens", "kv_cache_config", "tokenizer", "trust_remote_code", "revision",
}  # fmt: skip
KV_CACHE_ARGUMENTS = {"free_gpu_memory_fraction", "enable_block_reuse", "max_tokens", "dtype"}
SAMPLING_ARGUMENTS = {
    "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "best_of", "n", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "min_tokens", "logprobs", "return_perf_metrics",
}  # fmt: skip


class SamplingParams:
    """Keeps its arguments; an unknown one raises."""

    def __init__(self, **arguments: Any) -> None:
        if unknown := set(arguments) - SAMPLING_ARGUMENTS:
            raise TypeError(f"SamplingParams has no {sorted(unknown)}")
        self.arguments = arguments


class LLM:
    """Keeps nothing; an unknown argument raises."""

    def __init__(self, **arguments: Any) -> None:
        unknown = (set(arguments) - LLM_ARGUMENTS) | (set(arguments.get("kv_cache_config", {})) - KV_CACHE_ARGUMENTS)
        if unknown:
            raise TypeError(f"LLM has no {sorted(unknown)}")

    def generate_async(self, inputs: str, sampling_params: SamplingParams, streaming: bool) -> Result:
        """Begin; ``max_tokens`` above 1000 is refused as the real one refuses what does not fit."""
        if sampling_params.arguments.get("max_tokens", 32) > 1000:
            raise ValueError("max_tokens does not fit\n  at /opt/secret/place.py")
        return Result(inputs.split(), sampling_params.arguments, streaming)

    def shutdown(self) -> None:
        """Nothing to give back."""


class Result:
    """What grows: awaited it is whole, iterated it comes word by word, its text cumulative."""

    def __init__(self, words: list[str], arguments: dict[str, Any], streaming: bool) -> None:
        self._words, self._arguments, self._streaming = words, arguments, streaming
        self._aborted = False
        self.outputs = [SimpleNamespace(text="", finish_reason=None, stop_reason=None, cumulative_logprob=None)]

    def abort(self) -> None:
        """End before the next word."""
        self._aborted = True

    def aborted(self) -> bool:
        """Whether ``abort`` was called."""
        return self._aborted

    async def _grow(self) -> AsyncIterator[Result]:
        output = self.outputs[0]
        most = self._arguments.get("max_tokens", 32)
        for step in range(most):
            await asyncio.sleep(self._arguments.get("temperature", 0) / 1e3)
            if self._aborted:
                return
            word = self._words[step % len(self._words)]
            if word == END:
                output.finish_reason = "stop"
            else:
                self._say(word, step)
            if output.finish_reason is None and step == most - 1:
                output.finish_reason = "length"
            yield self
            if output.finish_reason:
                return

    def _say(self, word: str, step: int) -> None:
        output = self.outputs[0]
        output.text += " " + word
        output.cumulative_logprob = -0.5 * (step + 1) if "logprobs" in self._arguments else None
        stop = next((stop for stop in self._arguments.get("stop", []) if stop in output.text), None)
        if stop is not None:
            output.text = output.text[: output.text.index(stop)]
            output.finish_reason, output.stop_reason = "stop", stop

    def __aiter__(self) -> AsyncIterator[Result]:
        return self._grow()

    def __await__(self) -> Generator[Any, None, Result]:
        async def whole() -> Result:
            async for _ in self._grow():
                pass
            return self

        return whole().__await__()
