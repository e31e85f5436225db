"""What TensorRT-LLM's runtime makes of an engine's limits: they are not all those that the engine was built with."""

from __future__ import annotations


def longest_prompt(max_seq_len: int, max_num_tokens: int, *, chunked_context: bool) -> int:
    """The longest prompt that the runtime takes, in tokens.

    Not the build's max_input_len, which the runtime does not look at (preprocessing and the text model hold a prompt
    against it). With chunked context a prompt is only to leave room for one token; without it must also fit in one
    step. Source: cpp/tensorrt_llm/batch_manager/trtGptModel.h (NVIDIA/TensorRT-LLM 2e2327b9, c8c6df08): the log line
    "TRTGptModel maxInputLen"; llmRequest.cpp (119c6e60), ``validate``: a longer prompt is refused. Both with context
    FMHA and packed input, which every engine of this toolkit has.
    """
    return max_seq_len - 1 if chunked_context else min(max_seq_len - 1, max_num_tokens)
