"""How the ensemble connects its three models (TensorRT-LLM 1.2's template without what a text model lacks)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from minitron_triton.repository import tensors


@dataclass(frozen=True)
class EnsembleStep:
    """One model inside an ensemble; the maps go from the model's tensor to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


#: Inputs of the ensemble that the engine takes under the same name.
_SAME_NAME = (
    "beam_width", "exclude_input_in_output", "frequency_penalty", "min_tokens", "num_return_sequences",
    "presence_penalty", "repetition_penalty", "return_context_logits", "return_generation_logits", "return_log_probs",
    "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics", "seed", "temperature",
)  # fmt: skip

_PREPROCESSING = EnsembleStep(
    "preprocessing",
    {
        "QUERY": "text_input",
        "REQUEST_OUTPUT_LEN": "max_tokens",
        "BAD_WORDS_DICT": "bad_words",
        "STOP_WORDS_DICT": "stop_words",
        "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
        "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
        "END_ID": "end_id",
        "PAD_ID": "pad_id",
    },
    {
        "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN",
        "INPUT_ID": "_INPUT_ID",
        "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
        "STOP_WORDS_IDS": "_STOP_WORDS_IDS",
        "BAD_WORDS_IDS": "_BAD_WORDS_IDS",
        "EMBEDDING_BIAS": "_EMBEDDING_BIAS",
        "OUT_END_ID": "_PREPROCESSOR_END_ID",
        "OUT_PAD_ID": "_PREPROCESSOR_PAD_ID",
    },
)

_ENGINE = EnsembleStep(
    "tensorrt_llm",
    {
        "input_ids": "_INPUT_ID",
        "input_lengths": "_REQUEST_INPUT_LEN",
        "request_output_len": "_REQUEST_OUTPUT_LEN",
        "end_id": "_PREPROCESSOR_END_ID",
        "pad_id": "_PREPROCESSOR_PAD_ID",
        "embedding_bias": "_EMBEDDING_BIAS",
        "stop_words_list": "_STOP_WORDS_IDS",
        "bad_words_list": "_BAD_WORDS_IDS",
        "runtime_top_k": "top_k",
        "runtime_top_p": "top_p",
        "len_penalty": "length_penalty",
        "streaming": "stream",
        **{name: name for name in _SAME_NAME},
    },
    {
        "output_ids": "_TOKENS_BATCH",
        "sequence_length": "_SEQUENCE_LENGTH",
        **{tensor.name: tensor.name for tensor in tensors.RESULT_OUTPUTS},
    },
)

_POSTPROCESSING = EnsembleStep(
    "postprocessing",
    {"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
    {"OUTPUT": "text_output"},
)


def steps(logits: Collection[str]) -> tuple[EnsembleStep, ...]:
    """The models in their order, with the kinds of ``logits`` that are offered.

    Names that begin with an underscore exist only between the steps.
    """
    left_out = tensors.not_offered(logits)
    engine = replace(
        _ENGINE,
        inputs={name: outer for name, outer in _ENGINE.inputs.items() if name not in left_out},
        outputs={name: outer for name, outer in _ENGINE.outputs.items() if name not in left_out},
    )
    return (_PREPROCESSING, engine, _POSTPROCESSING)
