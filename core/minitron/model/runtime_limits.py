"""What an engine's runtime makes of its limits: they are not all those that the engine was built with.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

#: Tokens of a KV cache block: trtllm-build's default of --tokens_per_block (tensorrt_llm/plugin/plugin.py, 1.x), which
#: every engine of this toolkit has, and what OpenVINO's CPU plugin fixes.
TOKENS_PER_BLOCK = 32


def blocks_of(tokens: int) -> int:
    """Blocks of the KV cache that a sequence of so many tokens takes."""
    return -(-tokens // TOKENS_PER_BLOCK)


def whole_blocks(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of the KV cache block."""
    return blocks_of(tokens) * TOKENS_PER_BLOCK


def longest_prompt(max_seq_len: int, max_num_tokens: int, *, chunked_context: bool) -> int:
    """The longest prompt that TensorRT-LLM's runtime takes, in tokens.

    Not the build's max_input_len, which the runtime does not look at (preprocessing and the text model hold a prompt
    against it). With chunked context a prompt is only to leave room for one token; without it must also fit in one
    step. Source: cpp/tensorrt_llm/batch_manager/trtGptModel.h (NVIDIA/TensorRT-LLM 2e2327b9, c8c6df08): the log line
    "TRTGptModel maxInputLen"; llmRequest.cpp (119c6e60), ``validate``: a longer prompt is refused. Both with context
    FMHA and packed input, which every engine of this toolkit has.
    """
    return max_seq_len - 1 if chunked_context else min(max_seq_len - 1, max_num_tokens)
