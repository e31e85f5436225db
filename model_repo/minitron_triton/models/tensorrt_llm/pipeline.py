"""OpenVINO GenAI's continuous batching pipeline and OpenVINO's plain model, opened with the engine's settings: the only
users of the libraries here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.machine import cpu_head, cpu_memory
from minitron.machine.memory import available_bytes, release_mapped
from minitron.machine.openvino import ov, process_core  # before the next: it keeps OpenVINO's analytics away
from minitron.model.runtime_limits import TOKENS_PER_BLOCK

from .engine_config import EngineConfig
from .generation_request import Request
from .speculation import NGRAM

import openvino_genai as genai  # isort: skip

_HALF, _ODD = 0xFFFFFFFF, 0x9E3779B1  # 2**32 divided by the golden ratio, made odd
_NEVER = 0  # any valid token: with ignore_eos it is not looked at, but the library wants one


def open_pipeline(engine: EngineConfig, *, kv_blocks: int, reuse_kv_cache: bool, prompt_lookup: bool = False) -> Any:
    """Load the engine's model; blocks the caller for seconds to a minute.

    ``prompt_lookup``: every request has drafts.
    """
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = kv_blocks
    scheduler.max_num_seqs = engine.max_batch_size
    scheduler.max_num_batched_tokens = engine.max_num_tokens
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = reuse_kv_cache
    properties = engine.properties | ({"prompt_lookup": True} if prompt_lookup else {})
    return genai.ContinuousBatchingPipeline(str(engine.folder / "openvino"), scheduler, "CPU", properties)


def release_file(engine: EngineConfig) -> None:
    """Give the file's pages back once the plugin has its own, packed copy of the weights: each would be there twice."""
    release_mapped(engine.folder / "openvino" / "openvino_model.bin")


class PlainModel:
    """The engine's model by itself, all logits of what it is given; keys and values are kept until ``reset_state``.

    They are those of the 16-bit head, also where the engine looks through a screen first: here every word counts.
    """

    def __init__(self, engine: EngineConfig) -> None:
        """Load it; blocks the caller for seconds to a minute."""
        core = process_core()
        model = cpu_head.without_screen(core.read_model(str(engine.folder / "openvino" / "openvino_model.xml")))
        self._request = core.compile_model(model, "CPU", engine.properties).create_infer_request()

    def reset_state(self) -> None:
        """Begin another text."""
        self._request.reset_state()

    def infer(self, ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Logits [n, vocabulary] of ``ids``, which stand behind ``start`` others."""
        stop = start + len(ids)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: NDArray[np.float32] = self._request.infer(inputs, share_outputs=True)["logits"][0]
        return logits


def kv_blocks(engine: EngineConfig, tokens: int | None) -> int:
    """Blocks of the KV cache: for ``tokens`` where given, else for every sequence at full length if memory allows it.

    At most half of the memory that the engine leaves is taken. Raises ValueError with the bytes needed where not even
    one sequence of full length fits.
    """
    if tokens is not None:
        return max(1, tokens // TOKENS_PER_BLOCK)
    sizes, available = cpu_memory.read(engine.folder), available_bytes()
    if not (found := sizes.kv_tokens(available)):
        raise ValueError(
            f"the KV cache of one sequence of {engine.max_seq_len} tokens needs "
            f"{sizes.kv_bytes(sizes.sequence_tokens):,} bytes, and beside {sizes.engine_bytes:,} for the engine "
            f"{max(available - sizes.engine_bytes, 0):,} are left, half of which it may take; set "
            "max_tokens_in_paged_kv_cache, or build with a smaller --max-seq-len"
        )
    return found // TOKENS_PER_BLOCK


def input_ids(request: Request) -> Any:
    """The prompt as the pipeline wants it: int64 [1, n]."""
    return ov.Tensor(np.asarray(request.prompt, dtype=np.int64)[None])


def generation_config(request: Request, drafts: int = 0) -> Any:
    """TensorRT-LLM's parameters in the pipeline's terms. Stop words and log probs are dealt with outside it.

    ``drafts``: tokens drafted for a step; a pipeline with prompt lookup refuses 0, and others know no other number.
    """
    config = genai.GenerationConfig()
    config.apply_chat_template = False
    config.max_new_tokens = request.max_new_tokens
    config.logprobs = 1
    config.eos_token_id = min(request.end_ids, default=_NEVER)
    config.stop_token_ids = set(request.end_ids or {_NEVER})  # all of these end, and are banned until min_new_tokens
    config.ignore_eos = not request.end_ids
    config.min_new_tokens = request.min_tokens if request.end_ids else 0
    config.repetition_penalty = request.repetition_penalty
    if drafts:
        config.num_assistant_tokens, config.max_ngram_size = drafts, NGRAM
    config.do_sample = not request.is_greedy
    if config.do_sample:
        config.temperature = divisor_of_temperature(request.temperature)
        config.top_k = request.top_k
        config.top_p = request.top_p or 1.0
        config.rng_seed = seed_of_32_bits(request.seed)
    return config


def divisor_of_temperature(temperature: float) -> float:
    """What TensorRT-LLM divides logits by: the temperature plus 1e-6, but 1 for 1 (penaltyKernels.cu).

    So the tiniest one is greedy there. OpenVINO GenAI 2026.4.1 multiplies by 1 / temperature: below 1.2e-38 every logit
    becomes infinite, and all candidates are as good as each other.
    """
    return temperature if temperature == 1 else temperature + 1e-6


def seed_of_32_bits(seed: int) -> int:
    """The pipeline's seed for one of 64 bits, of which it would take the lower 32 alone (it seeds a std::mt19937).

    Below 2**32 it is the seed itself. The upper half is scattered (an odd factor, a shifted xor: invertible) and
    mixed in, so that two seeds with one half in common never meet.
    """
    scattered = (seed >> 32) * _ODD & _HALF
    return (seed & _HALF) ^ scattered ^ (scattered >> 15)


def has_ended(handle: Any) -> bool:
    """Whether the pipeline will give nothing more for this handle."""
    return bool(handle.get_status() != genai.GenerationStatus.RUNNING)


def was_ignored(handle: Any) -> bool:
    """Whether the pipeline gave the request up for want of cache."""
    return bool(handle.get_status() == genai.GenerationStatus.IGNORED)


def one_line(error: object) -> str:
    """An exception's own words, without the lines that only name places in the library's sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not re.search(r"\.[ch]pp:\d+", line)) or type(error).__name__
