"""The four kinds of model that take a request, and the names their tensors have.

``bls`` and ``ensemble`` take text under one set of names, ``llmapi`` takes text under another, and ``tokens`` is
``tensorrt_llm`` itself, which takes token ids. Which one a model is, its own config says. ``local`` is ``tensorrt_llm``
with the text model's part done here (``local_text``).

Source: config.pbtxt of these models in NVIDIA/TensorRT-LLM, triton_backend, 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from minitron.errors import InvalidRequest, UsageError
from minitron_client.client.local_text import INPUTS, LocalText
from minitron_client.client.request import Request
from minitron_client.client.tensors import pack

# The models that may stand in front, best first, in the repositories of this toolkit and of NVIDIA.
FRONTS = ("tensorrt_llm_bls", "ensemble", "tensorrt_llm")

_TEXT, _LLMAPI, _TOKENS = 0, 1, 2
_SAME = ("min_tokens", "temperature", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
         "beam_width", "num_return_sequences", "end_id", "pad_id", "return_log_probs", "return_perf_metrics",
         "return_num_input_tokens", "return_num_output_tokens", "exclude_input_in_output")  # fmt: skip
# What is asked: its name in the text models, in llmapi, and in tensorrt_llm (None: it cannot be said there).
_NAMES: dict[str, tuple[str | None, str | None, str | None]] = {
    **{name: (name, f"sampling_param_{name}", name) for name in _SAME},
    "prompt": ("text_input", "text_input", None),
    "input_ids": (None, None, "input_ids"),
    "input_length": (None, None, "input_lengths"),
    "max_tokens": ("max_tokens", "sampling_param_max_tokens", "request_output_len"),
    "top_k": ("top_k", "sampling_param_top_k", "runtime_top_k"),
    "top_p": ("top_p", "sampling_param_top_p", "runtime_top_p"),
    "top_p_decay": (None, None, "runtime_top_p_decay"),
    "top_p_reset_id": (None, None, "runtime_top_p_reset_ids"),
    "length_penalty": ("length_penalty", None, "len_penalty"),
    "no_repeat_ngram_size": (None, None, "no_repeat_ngram_size"),
    "beam_search_diversity_rate": (None, None, "beam_search_diversity_rate"),
    "stop_words": ("stop_words", "sampling_param_stop", None),
    "bad_words": ("bad_words", None, None),
    "stop_ids": (None, None, "stop_words_list"),
    "bad_ids": (None, None, "bad_words_list"),
    "bias_words": ("embedding_bias_words", None, None),
    "bias_weights": ("embedding_bias_weights", None, None),
    "stream": ("stream", "streaming", "streaming"),
    "return_log_probs": ("return_log_probs", None, "return_log_probs"),
    "return_finish_reason": (None, "return_finish_reason", None),
    "exclude_input_in_output":
        ("exclude_input_in_output", "sampling_param_exclude_input_from_output", "exclude_input_in_output"),
}  # fmt: skip
_WORD_LISTS = ("stop_ids", "bad_ids")
_SEQUENCES = ("input_ids", "stop_words", "bad_words")
# Asked of every model that has a tensor for it, and not missed where it has none.
_ALWAYS = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_finish_reason": True,
           "exclude_input_in_output": True}  # fmt: skip


@dataclass(frozen=True)
class ServedModel:
    """A model that takes requests, as far as the client must know it.

    ``inputs``: declared tensors and their Triton types. ``cumulative``: its streamed text repeats what came before.
    ``engine``: of an ensemble, the model that generates. ``text``: what makes text of its tokens here (dialect
    "local").
    """

    name: str
    dialect: str
    decoupled: bool
    batched: bool
    inputs: dict[str, str]
    cumulative: bool = False
    engine: ServedModel | None = None
    text: LocalText | None = None

    @property
    def counted_as(self) -> str:
        """The model under whose name Triton counts its requests: the gateway's ask the engine itself."""
        return FRONTS[-1] if self.dialect == "openai" else self.name

    @property
    def takes_ids(self) -> bool:
        """Whether it takes token ids rather than text."""
        return self.dialect == "tokens"

    @property
    def takes_stops(self) -> bool:
        """Whether a request is ended by a ``stop`` with its id, and its stream then read to the end.

        It is, wherever that can be: Triton's handler of gRPC streams was seen to crash under cancelled ones (2.51; the
        same code on its main branch of August 2026), and a cancelled ensemble stays behind in the server (before core
        5280db8, 26.03).
        """
        return "stop" in (self.engine or self).inputs

    @property
    def column(self) -> int:
        """Its column in the table of names."""
        return {"tokens": _TOKENS, "llmapi": _LLMAPI}.get(self.dialect, _TEXT)


def served_model(config: Any, engine_config: Any) -> ServedModel:
    """Read what kind of model it is from its config (``inference.ModelConfig``).

    ``engine_config``: of the model that generates, where ``config`` is an ensemble's; else ``config`` again.
    Raises InvalidRequest for a model that takes no requests of ours.
    """
    inputs = {tensor.name: _type_name(tensor.data_type) for tensor in config.input}
    engine = None
    if config.platform == "ensemble":
        dialect, engine = "ensemble", served_model(engine_config, engine_config)
    elif "input_ids" in inputs:
        dialect = "tokens"
    elif "sampling_param_max_tokens" in inputs:
        dialect = "llmapi"
    elif {"text_input", "max_tokens"} <= inputs.keys():
        dialect = "bls"
    else:
        raise InvalidRequest(f"model {config.name!r} takes neither text nor token ids; ask one of {', '.join(FRONTS)}")
    accumulates = (
        config.parameters["accumulate_tokens"].string_value if "accumulate_tokens" in config.parameters else ""
    )
    return ServedModel(
        config.name, dialect, engine_config.model_transaction_policy.decoupled,
        batched=config.max_batch_size > 0, inputs=inputs,
        cumulative=dialect == "llmapi" or accumulates.lower() in ("true", "1"),
        engine=engine,
    )  # fmt: skip


def with_local_text(engine: ServedModel, text: LocalText) -> ServedModel:
    """A model that takes ids, as one that takes text; raises UsageError for one that takes text anyway."""
    if not engine.takes_ids:
        raise UsageError(f"model {engine.name!r} takes text; a tokenizer here is for one that takes ids")
    return replace(engine, dialect="local", inputs=dict(INPUTS), engine=engine, text=text)


def _type_name(data_type: int) -> str:
    name = str(pb.model__config__pb2.DataType.Name(data_type)).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def engine_step(config: Any) -> str | None:
    """Of an ensemble, the model that generates; None for any other model."""
    return next((step.model_name for step in config.ensemble_scheduling.step if "input_ids" in step.input_map), None)


def message(model: ServedModel, request: Request, request_id: str, *, stream: bool) -> Any:
    """The ``ModelInferRequest`` that asks ``request`` of ``model``; raises InvalidRequest where it cannot be asked."""
    if (request.input_ids is not None) != model.takes_ids:
        needed = "token ids (input_ids)" if model.takes_ids else "text (prompt)"
        raise InvalidRequest(f"the request was not sent: model {model.name!r} takes {needed}")
    if stream and (request.beam_width or 1) > 1:
        raise InvalidRequest("the request was not sent: beam search gives its answer at once; ask without streaming")
    infer = pb.ModelInferRequest(model_name=model.name, id=request_id)
    # The last response is marked even where it is empty, so that a stream that ends early can be told from a whole one.
    infer.parameters["triton_enable_empty_final_response"].bool_param = True
    for field, values in (_asked(request, model, stream and model.decoupled) | _always(model)).items():
        _add(infer, model, field, values)
    return infer


def stop_message(model: ServedModel, request_id: str) -> Any:
    """The request that ends the one with ``request_id``, with all inputs that Triton demands of any; raises
    InvalidRequest where nothing takes it."""
    model = model.engine or model
    if not model.takes_stops:
        raise InvalidRequest(
            f"model {model.name!r} has no input 'stop'; its requests end when their stream is cancelled"
        )
    infer = pb.ModelInferRequest(model_name=model.name, id=request_id)
    values = {"input_ids": 0, "input_lengths": 1, "request_output_len": 1, "text_input": "-", "max_tokens": 1,
              "stop": True}  # fmt: skip
    for tensor, value in values.items():
        if tensor in model.inputs:
            infer.inputs.add(name=tensor, datatype=model.inputs[tensor], shape=[1, 1] if model.batched else [1])
            infer.raw_input_contents.append(pack(model.inputs[tensor], [value]))
    return infer


def _asked(request: Request, model: ServedModel, stream: bool) -> dict[str, Sequence[Any]]:
    """What this request says, in the words of ``_NAMES``."""
    asked: dict[str, Sequence[Any]] = {}
    for field in _NAMES:
        value = getattr(request, field, None)
        if field in _WORD_LISTS and value:
            asked[field] = _word_list(value)
        elif field in _SEQUENCES and value:
            asked[field] = value
        elif field not in _WORD_LISTS + _SEQUENCES and value is not None and value is not False:
            asked[field] = [value]
    if request.input_ids is not None:
        asked["input_length"] = [len(request.input_ids)]
    if request.embedding_bias:
        asked["bias_words"] = list(request.embedding_bias)
        asked["bias_weights"] = list(request.embedding_bias.values())
    if request.ignore_end and not model.takes_ids:  # tensorrt_llm itself knows no end unless it is told one
        asked["end_id"] = [-1]
    if stream:
        asked["stream"] = [True]
    return asked


def _always(model: ServedModel) -> dict[str, Sequence[Any]]:
    return {field: [value] for field, value in _ALWAYS.items() if _NAMES[field][model.column] in model.inputs}


def _word_list(words: Sequence[Sequence[int]]) -> list[int]:
    """Rows of a word list, one after the other: all ids in a row, then where each word ends, filled up with -1."""
    flat = [token for word in words for token in word]
    ends, end = [], 0
    for word in words:
        end += len(word)
        ends.append(end)
    return flat + ends + [-1] * (len(flat) - len(ends))


def _add(infer: Any, model: ServedModel, field: str, values: Sequence[Any]) -> None:
    name = _NAMES[field][model.column]
    if name is None or name not in model.inputs:
        raise InvalidRequest(f"the request was not sent: model {model.name!r} has no input for {field}")
    datatype = model.inputs[name]
    shape = [2, len(values) // 2] if field in _WORD_LISTS else [len(values)]
    infer.inputs.add(name=name, datatype=datatype, shape=[1, *shape] if model.batched else shape)
    infer.raw_input_contents.append(pack(datatype, values))
