"""The tensors that each model of the repository declares, for a decoder-only text model.

They are those of TensorRT-LLM 1.2's own templates (triton_backend/all_models/inflight_batcher_llm, 1.2.0rc8) without
encoder, multimodal, LoRA, draft and guided-decoding tensors, plus ``no_repeat_ngram_size``, which the C++ backend reads
although its template forgets it. One line of a table is one tensor: name, type, dims, flags. ``scalar`` is a reshape
to [], so that the model sees [batch]; LOGITS stands for the type of the engine's logits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

LOGITS = "LOGITS"


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model; ``dims`` without the batch axis, -1 where a length varies."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False
    scalar: bool = False


def _table(text: str) -> tuple[Tensor, ...]:
    return tuple(_tensor(line.split()) for line in text.strip().splitlines())


def _tensor(words: list[str]) -> Tensor:
    name, dtype, dims, *flags = words
    unknown = set(flags) - {"optional", "ragged", "scalar"}
    assert not unknown, unknown
    lengths = tuple(int(length) for length in dims.split(","))
    return Tensor(name, dtype, lengths, "optional" in flags, "ragged" in flags, "scalar" in flags)


def with_logits(tensors: tuple[Tensor, ...], dtype: str) -> tuple[Tensor, ...]:
    """The same tensors with the logits' type filled in."""
    return tuple(replace(tensor, dtype=dtype) if tensor.dtype == LOGITS else tensor for tensor in tensors)


#: Kinds of logits, and the tensors that ask for one and that carry it.
LOGITS_OF = {kind: (f"return_{kind}_logits", f"{kind}_logits") for kind in ("context", "generation")}


def offered(tensors: tuple[Tensor, ...], kinds: Collection[str]) -> tuple[Tensor, ...]:
    """The tensors without the kinds of logits that are not in ``kinds``: Triton refuses what is not declared."""
    left_out = not_offered(kinds)
    return tuple(tensor for tensor in tensors if tensor.name not in left_out)


def not_offered(kinds: Collection[str]) -> set[str]:
    """Names of the tensors of the other kinds of logits."""
    return {name for kind, names in LOGITS_OF.items() if kind not in kinds for name in names}


PREPROCESSING_INPUTS = _table("""
QUERY                   STRING  1
REQUEST_OUTPUT_LEN      INT32   1
BAD_WORDS_DICT          STRING  -1  optional
STOP_WORDS_DICT         STRING  -1  optional
EMBEDDING_BIAS_WORDS    STRING  -1  optional
EMBEDDING_BIAS_WEIGHTS  FP32    -1  optional
END_ID                  INT32   1   optional
PAD_ID                  INT32   1   optional
""")

PREPROCESSING_OUTPUTS = _table("""
INPUT_ID            INT32  -1
REQUEST_INPUT_LEN   INT32  1
BAD_WORDS_IDS       INT32  2,-1
STOP_WORDS_IDS      INT32  2,-1
EMBEDDING_BIAS      FP32   -1
REQUEST_OUTPUT_LEN  INT32  -1
OUT_END_ID          INT32  1
OUT_PAD_ID          INT32  1
""")

POSTPROCESSING_INPUTS = _table("""
TOKENS_BATCH     INT32  -1,-1
SEQUENCE_LENGTH  INT32  -1
""")

POSTPROCESSING_OUTPUTS = _table("""
OUTPUT  STRING  -1
""")

ENGINE_INPUTS = _table("""
input_ids                   INT32   -1    optional ragged
input_lengths               INT32   1     scalar
request_output_len          INT32   1     scalar
num_return_sequences        INT32   1     optional scalar
end_id                      INT32   1     optional scalar
pad_id                      INT32   1     optional scalar
stop_words_list             INT32   2,-1  optional ragged
bad_words_list              INT32   2,-1  optional ragged
embedding_bias              FP32    -1    optional ragged
beam_width                  INT32   1     optional scalar
temperature                 FP32    1     optional scalar
runtime_top_k               INT32   1     optional scalar
runtime_top_p               FP32    1     optional scalar
runtime_top_p_min           FP32    1     optional scalar
runtime_top_p_decay         FP32    1     optional scalar
runtime_top_p_reset_ids     INT32   1     optional scalar
len_penalty                 FP32    1     optional scalar
early_stopping              BOOL    1     optional scalar
repetition_penalty          FP32    1     optional scalar
min_tokens                  INT32   1     optional scalar
beam_search_diversity_rate  FP32    1     optional scalar
presence_penalty            FP32    1     optional scalar
frequency_penalty           FP32    1     optional scalar
no_repeat_ngram_size        INT32   1     optional scalar
seed                        UINT64  1     optional scalar
return_log_probs            BOOL    1     optional scalar
return_context_logits       BOOL    1     optional scalar
return_generation_logits    BOOL    1     optional scalar
return_perf_metrics         BOOL    1     optional scalar
return_num_input_tokens     BOOL    1     optional scalar
return_num_output_tokens    BOOL    1     optional scalar
exclude_input_in_output     BOOL    1     optional scalar
stop                        BOOL    1     optional scalar
streaming                   BOOL    1     optional scalar
""")

#: What a generation returns beside its tokens; the ensemble and the BLS pass these on under the same names.
RESULT_OUTPUTS = _table("""
cum_log_probs                FP32    -1
output_log_probs             FP32    -1,-1
context_logits               LOGITS  -1,-1
generation_logits            LOGITS  -1,-1,-1
batch_index                  INT32   1
sequence_index               INT32   1
kv_cache_alloc_new_blocks    INT32   1
kv_cache_reused_blocks       INT32   1
kv_cache_alloc_total_blocks  INT32   1
arrival_time_ns              INT64   1
first_scheduled_time_ns      INT64   1
first_token_time_ns          INT64   1
last_token_time_ns           INT64   1
acceptance_rate              FP32    1
total_accepted_draft_tokens  INT32   1
total_draft_tokens           INT32   1
num_input_tokens             INT32   1
num_output_tokens            INT32   1
""")

ENGINE_OUTPUTS = (
    _table("""
output_ids       INT32  -1,-1
sequence_length  INT32  -1
""")
    + RESULT_OUTPUTS
)

ENSEMBLE_INPUTS = _table("""
text_input                STRING  1
max_tokens                INT32   1
num_return_sequences      INT32   1   optional
bad_words                 STRING  -1  optional
stop_words                STRING  -1  optional
exclude_input_in_output   BOOL    1   optional
end_id                    INT32   1   optional
pad_id                    INT32   1   optional
top_k                     INT32   1   optional
top_p                     FP32    1   optional
temperature               FP32    1   optional
length_penalty            FP32    1   optional
repetition_penalty        FP32    1   optional
min_tokens                INT32   1   optional
presence_penalty          FP32    1   optional
frequency_penalty         FP32    1   optional
seed                      UINT64  1   optional
return_log_probs          BOOL    1   optional
return_context_logits     BOOL    1   optional
return_generation_logits  BOOL    1   optional
return_perf_metrics       BOOL    1   optional
return_num_input_tokens   BOOL    1   optional
return_num_output_tokens  BOOL    1   optional
beam_width                INT32   1   optional
stream                    BOOL    1   optional
embedding_bias_words      STRING  -1  optional
embedding_bias_weights    FP32    -1  optional
""")

TEXT_OUTPUTS = (Tensor("text_output", "STRING", (-1,)), *RESULT_OUTPUTS)

#: The BLS takes what the ensemble takes, these as scalars (its upstream declares just these with a reshape).
_BLS_SCALARS = {"num_return_sequences"} | {t.name for t in ENSEMBLE_INPUTS if t.name.startswith("return_")}
BLS_INPUTS = (
    *(replace(tensor, scalar=tensor.name in _BLS_SCALARS) for tensor in ENSEMBLE_INPUTS),
    Tensor("stop", "BOOL", (1,), optional=True),  # ours: as in tensorrt_llm
)

LLMAPI_INPUTS = _table("""
text_input                                STRING  -1
streaming                                 BOOL    1   optional
sampling_param_best_of                    INT32   1   optional
sampling_param_temperature                FP32    1   optional
sampling_param_top_k                      INT32   1   optional
sampling_param_top_p                      FP32    1   optional
sampling_param_frequency_penalty          FP32    1   optional
sampling_param_presence_penalty           FP32    1   optional
sampling_param_max_tokens                 INT32   1   optional
sampling_param_stop                       STRING  -1  optional
sampling_param_seed                       UINT64  1   optional
sampling_param_exclude_input_from_output  BOOL    1   optional
sampling_param_return_perf_metrics        BOOL    1   optional
return_finish_reason                      BOOL    1   optional
return_stop_reason                        BOOL    1   optional
return_cumulative_logprob                 BOOL    1   optional
stop                                      BOOL    1   optional
""")

LLMAPI_OUTPUTS = _table("""
text_output                  STRING  -1
finish_reason                STRING  -1
stop_reason                  STRING  -1
cumulative_logprob           FP32    -1
kv_cache_reused_block        INT32   -1
kv_cache_missed_block        INT32   -1
kv_cache_alloc_new_blocks    INT32   -1
kv_cache_alloc_total_blocks  INT32   -1
kv_cache_hit_rate            FP32    -1
arrival_time_ns              INT64   1
first_scheduled_time_ns      INT64   1
first_token_time_ns          INT64   1
last_token_time_ns           INT64   1
acceptance_rate              FP32    1
total_accepted_draft_tokens  INT32   1
total_draft_tokens           INT32   1
""")

#: Inputs and outputs of the models; logits are not filled in (``with_logits``).
BY_MODEL = {
    "preprocessing": (PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS),
    "tensorrt_llm": (ENGINE_INPUTS, ENGINE_OUTPUTS),
    "postprocessing": (POSTPROCESSING_INPUTS, POSTPROCESSING_OUTPUTS),
    "ensemble": (ENSEMBLE_INPUTS, TEXT_OUTPUTS),
    "tensorrt_llm_bls": (BLS_INPUTS, TEXT_OUTPUTS),
}
