"""The parameters of the models' configs, with the types that their readers expect.

The C++ backend never complains: a parameter that it cannot parse is replaced by a default, and one that it does not
know is ignored. So they are typed and validated here, when a repository is rendered and when one is checked.
Source: triton_backend/inflight_batcher_llm/src/{model_instance_state,model_state}.cc of TensorRT-LLM 1.2.0rc8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BOOLS = ("True", "true", "TRUE", "1", "False", "false", "FALSE", "0")
_TRUE = _BOOLS[:4]
_PATTERNS = {
    "bool": "|".join(_BOOLS),
    "int": r"-?\d{1,10}",
    "size": r"\d{1,19}",  # not negative
    "count": r"[1-9]\d{0,9}",  # above 0
    "share": r"0?\.\d+|0|1|1\.0*|0\.\d*",  # 0 to 1
    "ids": r"\d+(,\d+)*(;\d+(,\d+)*)*",  # a list per instance
    "lists": r"\{.*\}|\[.*\]",
    "text": r"[^\n]*",
    "path": r"[^\n]*",
}


@dataclass(frozen=True)
class Parameter:
    """How a parameter's value (always a string for Triton) has to look.

    ``required``: it has to be there, because its reader fails without it or falls back to a default in silence.
    """

    kind: str
    allowed: tuple[str, ...] = ()
    required: bool = False

    def problem(self, value: str) -> str | None:
        """What is wrong with ``value``, or None."""
        if self.allowed and value not in self.allowed:
            return f"is {value!r}, and {' or '.join(map(repr, self.allowed))} is needed"
        if not re.fullmatch(_PATTERNS[self.kind], value):
            return f"is {value!r}, and that is no {self.kind}"
        return None


#: What the C++ backend reads, for a text model. Values it would accept but that this toolkit cannot serve
#: (guided decoding, draft models) are left out, so they are refused.
ENGINE: Mapping[str, Parameter] = {
    "gpt_model_type": Parameter("text", ("inflight_fused_batching", "inflight_batching", "V1", "v1"), required=True),
    "gpt_model_path": Parameter("path", required=True),
    # These three are read outside any try block: a missing key fails the load, so they stand there, empty or not.
    "tokenizer_dir": Parameter("path", required=True),
    "xgrammar_tokenizer_info_path": Parameter("path", ("",), required=True),
    "guided_decoding_backend": Parameter("text", ("",), required=True),
    "max_beam_width": Parameter("count", required=True),
    "max_tokens_in_paged_kv_cache": Parameter("count"),
    "kv_cache_free_gpu_mem_fraction": Parameter("share", required=True),
    "kv_cache_host_memory_bytes": Parameter("size"),
    "kv_cache_onboard_blocks": Parameter("bool"),
    "max_attention_window_size": Parameter("ids"),
    "sink_token_length": Parameter("size"),
    "enable_kv_cache_reuse": Parameter("bool", required=True),
    "batch_scheduler_policy": Parameter("text", ("guaranteed_no_evict", "max_utilization"), required=True),
    "enable_chunked_context": Parameter("bool", required=True),
    "decoding_mode": Parameter("text", ("top_k", "top_p", "top_k_top_p", "beam_search"), required=True),
    "normalize_log_probs": Parameter("bool", required=True),
    "exclude_input_in_output": Parameter("bool", required=True),
    "cancellation_check_period_ms": Parameter("count", required=True),
    "stats_check_period_ms": Parameter("count", required=True),
    # The toolkit's own, read by the CPU engine. (The C++ backend has no parameter for the queue: layout.Queue.)
    "max_queue_size": Parameter("size", required=True),
    "speculation": Parameter("text", ("none", "prompt_lookup")),
    "recv_poll_period_ms": Parameter("size"),
    "iter_stats_max_iterations": Parameter("size"),
    "request_stats_max_iterations": Parameter("size"),
    "enable_trt_overlap": Parameter("bool"),
    "gpu_device_ids": Parameter("ids"),
    "participant_ids": Parameter("ids"),
    "num_nodes": Parameter("count"),
    "executor_worker_path": Parameter("path"),
    "multi_block_mode": Parameter("bool"),
    "enable_context_fmha_fp32_acc": Parameter("bool"),
    "cuda_graph_mode": Parameter("bool"),
    "cuda_graph_cache_size": Parameter("size"),
    "gpu_weights_percent": Parameter("share"),
    "FORCE_CPU_ONLY_INPUT_TENSORS": Parameter("text", ("yes", "no")),
}

_TOKENIZER = {
    "tokenizer_dir": Parameter("path", required=True),
}
#: Limits of the engine, which our preprocessing and BLS hold a request against before the engine sees it.
_LIMITS = {
    "max_input_len": Parameter("count", required=True),
    "max_seq_len": Parameter("count", required=True),
    "vocab_size": Parameter("count", required=True),
}

PREPROCESSING: Mapping[str, Parameter] = {
    **_TOKENIZER,
    "multimodal_model_path": Parameter("path", ("",), required=True),  # upstream's model demands the key
    "add_special_tokens": Parameter("bool", required=True),
    **_LIMITS,
}

POSTPROCESSING: Mapping[str, Parameter] = {
    **_TOKENIZER,
    "skip_special_tokens": Parameter("bool", required=True),
}

BLS: Mapping[str, Parameter] = {
    "tensorrt_llm_model_name": Parameter("text", required=True),
    **_TOKENIZER,
    "add_special_tokens": Parameter("bool", required=True),
    "skip_special_tokens": Parameter("bool", required=True),
    **_LIMITS,
    "exclude_input_in_output": Parameter("bool", required=True),
    "max_concurrency": Parameter("count", required=True),
    "max_queue_size": Parameter("size", required=True),
    "max_logits_bytes": Parameter("size", required=True),
    "cancellation_check_period_ms": Parameter("count", required=True),
    # Of the logits of a whole prompt that the engine returns, which log probs of the prompt are made of.
    "context_logits": Parameter("text", ("FP32", "FP16", "none"), required=True),
    # Where the server itself listens, for a Triton that 'minitron serve' did not start.
    "grpc_url": Parameter("text"),
    **{f"grpc_{name}": Parameter("path") for name in ("ca", "cert", "key", "api_key_file")},
    "grpc_authority": Parameter("text"),
}

ENSEMBLE: Mapping[str, Parameter] = {}

BY_MODEL: Mapping[str, Mapping[str, Parameter]] = {
    "preprocessing": PREPROCESSING,
    "tensorrt_llm": ENGINE,
    "postprocessing": POSTPROCESSING,
    "ensemble": ENSEMBLE,
    "tensorrt_llm_bls": BLS,
}


def is_true(value: str | None) -> bool:
    """Whether a parameter is one of the spellings of true."""
    return value in _TRUE


def problems(model: str, values: Mapping[str, str], known: Mapping[str, Parameter]) -> list[tuple[str, str]]:
    """What is wrong with the parameters of ``model``: (key, sentence) pairs."""
    found = [(key, "is missing") for key, parameter in known.items() if parameter.required and key not in values]
    for key, value in values.items():
        if key not in known:
            found.append((key, f"is not a parameter that {model} reads"))
        elif problem := known[key].problem(value):
            found.append((key, problem))
    return found
