"""What has to fit: weights exactly, activations as an estimate, and how many sequences the rest holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitron.machine import cpu_memory
from minitron.machine.cpu_memory import Peak, Sizes
from minitron.model.precision import Precision
from minitron.model.shape import ModelShape
from minitron.recipe_model import Memory
from minitron_build.plan.limits import Limits
from minitron_build.plan.weights import (
    Parallel,
    WeightBytes,
    kv_bytes_per_token,
    layers_of_stage,
    qkv_rows,
    stage_bytes,
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest device. ``activation_bytes`` and ``runtime_bytes`` are estimates; None where not known.

    Of a CPU server the weights are those that it packs, the activations its step's, and ``cpu_peak`` is all that it
    takes with a cache for a full batch, as far as that fits. ``free_bytes`` is what is left for the KV cache;
    ``kv_bytes_per_token`` and ``sequences_that_fit`` (of the longest kind; ``typical_sequences_that_fit`` of the median
    one) follow from it and the largest fraction that may be taken.
    """

    capacity_bytes: int | None
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    free_bytes: int | None
    kv_bytes_per_token: int
    kv_tokens: int | None
    sequences_that_fit: int | None
    typical_sequences_that_fit: int | None
    cpu_peak: Peak | None = None


def activation_bytes(shape: ModelShape, limits: Limits, tp: int, margin: float, element_bytes: int = 2) -> int:
    """*Estimate* of what a step needs beside weights and cache.

    For each of max_num_tokens: the residual and its normalised copy (2 x hidden), the fused qkv and the attention's
    output (qkv rows + hidden / tp) and mlp.fc before and after its squared ReLU (2 x intermediate / tp), in
    ``element_bytes``; for each of max_batch_size: a row of logits in float32 and a copy of it that sampling sorts.
    All of it times 1 + margin. TensorRT shares buffers between layers, so one layer's worth is counted.
    """
    per_token = 2 * shape.hidden_size + qkv_rows(shape, tp) + (shape.hidden_size + 2 * shape.intermediate_size) // tp
    logits = 2 * 4 * shape.vocab_size * limits.max_batch_size
    return math.ceil((limits.max_num_tokens * per_token * element_bytes + logits) * (1 + margin))


def context_logits_bytes(shape: ModelShape, limits: Limits, element_bytes: int) -> int:
    """What logits of whole prompts take (gather_context_logits), 0 for ``element_bytes`` 0.

    A step's are a tensor [tokens of the step, vocabulary] of their own, made anew for each while the last one is still
    there (RuntimeBuffers::reshape in cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp): two of max_num_tokens. What is
    returned lies in the host's memory.
    """
    return 2 * limits.max_num_tokens * shape.vocab_size * element_bytes


def on_gpu(
    shape: ModelShape,
    precision: Precision,
    parallel: Parallel,
    limits: Limits,
    *,
    typical_tokens: int,
    memory: Memory,
    capacity_bytes: int,
    context_logits: int = 0,
    group_size: int | None = None,
    kv_element_bytes: float = 2,
) -> MemoryPlan:
    """The GPU that holds the fewest sequences, of all ranks; ``typical_tokens`` is the median sequence's length.

    ``context_logits``: bytes of one of the logits that the engine gathers of prompts, 0 where it does not.
    """
    plans = []
    for stage in range(parallel.pipeline):
        weights = stage_bytes(shape, precision, parallel, stage, group_size).total
        activation = activation_bytes(shape, limits, parallel.tensor, memory.activation_margin)
        if stage == parallel.pipeline - 1:
            activation += context_logits_bytes(shape, limits, context_logits)
        free = max(0, capacity_bytes - weights - activation - memory.runtime_bytes)
        kv_bytes = kv_bytes_per_token(shape, parallel.tensor, layers_of_stage(shape, parallel, stage), kv_element_bytes)
        tokens = int(free * (memory.kv_cache_fraction or memory.max_kv_cache_fraction)) // kv_bytes
        plans.append(MemoryPlan(
            capacity_bytes, weights, activation, memory.runtime_bytes, free, kv_bytes, tokens,
            tokens // limits.tokens_per_sequence, tokens // typical_tokens,
        ))  # fmt: skip
    return min(plans, key=lambda plan: plan.kv_tokens or 0)


def logits_bytes(shape: ModelShape, limits: Limits, max_logits_bytes: int) -> int:
    """Host memory for the logits that a full batch may ask for: float32 [tokens, vocabulary] of each request.

    TensorRT-LLM keeps them in pinned memory until a request is answered (cpp/include/tensorrt_llm/batch_manager/
    llmRequest.h, ``allocGenerationLogitsHost``: [beams, max new tokens, vocabulary]). None unless ``max_logits_bytes``
    (of one request) offers them.
    """
    one = min(max_logits_bytes, 4 * shape.vocab_size * limits.max_seq_len)
    return one * limits.max_batch_size


def kv_cache_fraction(plan: MemoryPlan, limits: Limits, memory: Memory) -> float:
    """kv_cache_free_gpu_mem_fraction: the share of ``free_bytes`` that a full batch of longest sequences needs.

    Rounded up to whole per cent and held between 0.01 and the recipe's maximum. TensorRT-LLM takes the fraction of what
    is free once the engine is loaded (its default, 0.9, takes the GPU whatever the workload needs).
    """
    if memory.kv_cache_fraction is not None:
        return memory.kv_cache_fraction
    needed = limits.max_batch_size * limits.tokens_per_sequence * plan.kv_bytes_per_token
    share = math.ceil(100 * needed / plan.free_bytes) / 100 if plan.free_bytes else 1.0
    return min(max(share, 0.01), memory.max_kv_cache_fraction)


def on_cpu(
    shape: ModelShape,
    weights: WeightBytes,
    limits: Limits,
    *,
    kv_element_bytes: float,
    typical_tokens: int,
    capacity_bytes: int | None,
    screened: bool,
    text_models: int,
) -> MemoryPlan:
    """This machine's memory (``minitron.machine.cpu_memory``); ``capacity_bytes`` None where not asked.

    ``weights`` as steps multiply with them; ``text_models``: processes with a tokenizer.
    """
    rows = qkv_rows(shape, 1)
    sizes = Sizes(
        weight_bytes=weights.read_per_token + weights.small,
        layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        computed_per_token=cpu_memory.computed_per_token(shape.hidden_size, rows, shape.intermediate_size),
        kv_bytes_per_token=kv_bytes_per_token(shape, element_bytes=kv_element_bytes),
        screened=screened,
        max_batch_size=limits.max_batch_size,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
    )  # fmt: skip
    least = cpu_memory.peak(sizes, 0, text_models=text_models)
    runtime, kv_bytes = least.engine + least.text + least.ensemble + least.server, int(sizes.kv_bytes_per_token)
    full = limits.max_batch_size * sizes.sequence_tokens
    if capacity_bytes is None:
        peak = cpu_memory.peak(sizes, full, text_models=text_models)
        return MemoryPlan(
            None, least.weights, least.step, runtime, None, kv_bytes, None, None, None, peak
        )  # fmt: skip
    free = max(0, capacity_bytes - least.private)
    tokens = free // kv_bytes
    return MemoryPlan(
        capacity_bytes, least.weights, least.step, runtime, free, kv_bytes, tokens,
        tokens // limits.tokens_per_sequence, tokens // typical_tokens,
        cpu_memory.peak(sizes, min(full, tokens), text_models=text_models),
    )  # fmt: skip
