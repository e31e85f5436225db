"""CPU engines of the models that transformers' answers are about (``answers``), made in this process."""

from __future__ import annotations

import functools
import queue
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from answers import Answers, dtype_of, make_model
from minitron.model import shape
from minitron.model.precision import Precision
from minitron.model.runtime_limits import TOKENS_PER_BLOCK
from minitron_build.checkpoint.convert import convert
from minitron_build.engines.openvino import write as cpu
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation import StepOutput
from minitron_triton.models.tensorrt_llm.generation_request import Request
from nemotron_reference import checkpoint_weights, logits

MODELS = ("small", "other")
BF16 = Precision.BFLOAT16
_OTHER = Answers.load("other")
#: Of the model "other" in bfloat16.
PROMPTS, EXPECTED = _OTHER.prompts, _OTHER.variants[BF16].continuations


@functools.cache
def _folder() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="cpu-engines-")
    _KEPT.append(holder)  # removed when the interpreter ends
    return Path(holder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def model(name: str) -> Path:
    """The Hugging Face folder of "small" or "other"."""
    return make_model(name, _folder)


@functools.cache
def checkpoint(name: str, precision: Precision) -> Path:
    """Its checkpoint, of the activation type that the answers are about."""
    output = _folder() / f"{name}-{precision.value}"
    dtype = dtype_of(precision, name) if precision.is_weight_only else "auto"
    convert(model(name), output, precision=precision.value, dtype=dtype)
    return output


@functools.cache
def engine(name: str, precision: Precision) -> Path:
    """Its CPU engine in exact mode."""
    output = _folder() / f"{name}-{precision.value}-engine"
    cpu.build(checkpoint(name, precision), output, cpu.CpuOptions())
    return output


def load(name: str, precision: Precision, *, blocks: int, max_queue: int = 0, prompt_lookup: bool = False) -> Engine:
    """The engine, loaded, with a KV cache of so many blocks; the caller closes it."""
    return Engine.load(
        engine(name, precision),
        kv_cache_tokens=blocks * TOKENS_PER_BLOCK,
        max_queue=max_queue,
        prompt_lookup=prompt_lookup,
    )


#: What the engine logs of a step that raised.
FAULT = "the engine failed in a step"


class Caller:
    """Submits a request and keeps what comes back."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._chunks: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self.chunks: list[StepOutput] = []
        self.generation = engine.submit(request, self._chunks.put)

    def next(self) -> StepOutput:
        self.chunks.append(self._chunks.get(timeout=60))
        return self.chunks[-1]

    def last(self) -> StepOutput:
        while not self.next().is_last:
            pass
        return self.chunks[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    """Submit all at once; the tokens of each."""
    callers = [Caller(engine, request) for request in requests]
    for caller in callers:
        assert caller.last().error is None
    return [caller.tokens for caller in callers]


def next_logits(ids: list[int]) -> NDArray[Any]:
    """Logits of "other" in bfloat16 after ``ids`` by the numpy Nemotron of the tests."""
    folder = checkpoint("other", BF16)
    sizes = shape.read(model("other") / "config.json")
    return np.asarray(logits(checkpoint_weights(folder), sizes, np.array(ids))[-1])


def greedy(ids: list[int], count: int, change: Callable[[Any, list[int]], None]) -> list[int]:
    """Greedy tokens by the numpy Nemotron, its logits changed by ``change(logits, tokens so far)`` in place."""
    found: list[int] = []
    for _ in range(count):
        row = next_logits(ids + found)
        change(row, found)
        found.append(int(row.argmax()))
    return found


def rows_of_logits(engine_folder: Path, answers: Answers, precision: Precision) -> NDArray[np.float32]:
    """Logits of an engine at the answers' places, by OpenVINO itself (not the pipeline): the model as a plain one."""
    from minitron.machine.openvino import process_core

    xml = engine_folder / "openvino" / "openvino_model.xml"
    compiled = process_core().compile_model(str(xml), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    whole: dict[int, NDArray[np.float32]] = {}
    rows = []
    for prompt, position in answers.places:
        if prompt not in whole:
            ids = answers.prompts[prompt] + answers.variants[precision].continuations[prompt]
            whole[prompt] = _logits(compiled, np.array(ids))
        rows.append(whole[prompt][position])
    return np.stack(rows)


def _logits(compiled: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    inputs = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    result: NDArray[np.float32] = compiled.create_infer_request().infer(inputs)["logits"][0]
    return result
