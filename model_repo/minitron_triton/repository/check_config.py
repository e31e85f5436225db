"""One config.pbtxt against the contract of its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minitron.artifacts.problem import Problem, error, warning
from minitron_triton.repository import parameters, tensors
from minitron_triton.repository.engine_folder import EngineFacts
from minitron_triton.repository.tensors import Tensor

_DECOUPLED = ("tensorrt_llm", "tensorrt_llm_bls")
_ONE_INSTANCE = ("tensorrt_llm", "tensorrt_llm_bls")
#: What our models set; another field may be well meant, but nobody here has looked at it.
_KNOWN = {
    "name", "backend", "platform", "max_batch_size", "input", "output", "parameters", "instance_group",
    "dynamic_batching", "model_transaction_policy", "ensemble_scheduling",
}  # fmt: skip
#: Fields that the bundled server (2.51, Triton 24.10) does not know, so that it loads nothing: since which release.
_NEWER = {"model_metrics": "24.11"}
_MOST_INSTANCES = 256


def check(model: str, config: Any, engine: EngineFacts | None) -> Iterator[Problem]:
    """What is wrong with the config of ``model``; ``engine`` is None where it could not be read."""
    where = f"{model}/config.pbtxt"
    if config.name != model:
        yield error(where, "name", f"is {config.name!r}, and the folder is {model!r}: write the folder's name")
    yield from _backend(model, config, engine, where)
    for field, message in _general(model, config, engine):
        yield error(where, field, message)
    logits = engine.logits_dtype if engine else "FP32"
    kinds = logits_offered(config)
    inputs, outputs = (tensors.with_logits(tensors.offered(every, kinds), logits) for every in tensors.BY_MODEL[model])
    yield from check_tensors("input", config.input, inputs, where)
    yield from check_tensors("output", config.output, outputs, where)
    values = {key: value.string_value for key, value in config.parameters.items()}
    for key, message in parameters.problems(model, values, parameters.BY_MODEL[model]):
        yield error(where, f"parameters {key}", message)
    for descriptor, _ in config.ListFields():
        if descriptor.name in _NEWER and engine is not None and engine.is_cpu:
            yield error(where, descriptor.name, f"is known from {_NEWER[descriptor.name]} on; the bundled server loads "
                                                "no model that has it")  # fmt: skip
        elif descriptor.name not in _KNOWN:
            yield warning(where, descriptor.name, "is not a field that this toolkit sets or has looked at")


def logits_offered(config: Any) -> set[str]:
    """The kinds of logits that a config has any tensor of."""
    declared = {tensor.name for tensor in (*config.input, *config.output)}
    return {kind for kind, names in tensors.LOGITS_OF.items() if declared & set(names)}


def _backend(model: str, config: Any, engine: EngineFacts | None, where: str) -> Iterator[Problem]:
    if model == "ensemble":
        if config.platform != "ensemble" or config.backend:
            yield error(where, "platform", f"is {config.platform!r}, and 'ensemble' without a backend is needed")
        return
    wanted = "python"
    if model == "tensorrt_llm" and engine is not None and not engine.is_cpu:
        wanted = "tensorrtllm"
    if config.backend != wanted:
        yield error(where, "backend", f"is {config.backend!r}, and {wanted!r} runs what lies here")


def _general(model: str, config: Any, engine: EngineFacts | None) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of everything that is neither tensor nor parameter."""
    if config.max_batch_size < 1:
        yield "max_batch_size", f"is {config.max_batch_size}, and at least 1 is needed: the tensors have a batch axis"
    elif engine is not None and config.max_batch_size > engine.max_batch_size:
        yield "max_batch_size", f"is {config.max_batch_size}, more than the engine's {engine.max_batch_size}"
    if config.model_transaction_policy.decoupled != (model in _DECOUPLED):
        needed = "true, because answers are streamed" if model in _DECOUPLED else "false: it answers each request once"
        yield "model_transaction_policy.decoupled", f"has to be {needed}"
    yield from batching(model, config, is_ordered=model == "postprocessing")
    yield from _instances(model, config)


def batching(model: str, config: Any, *, is_ordered: bool = False) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) about Triton's dynamic batcher, which holds requests back where it has a limit or a delay.

    What needs it: answers in the order of the requests (``is_ordered``), and the C++ backend, which takes the limit of
    its executor from there and nowhere else.
    """
    batcher = config.dynamic_batching
    if is_ordered and not batcher.preserve_ordering:
        yield "dynamic_batching.preserve_ordering", "has to be true, or the tokens of a stream overtake each other"
    elif batcher.preserve_ordering and not is_ordered:
        yield (
            "dynamic_batching.preserve_ordering",
            "has to be left out: whole streams would be answered one after the other",
        )
    limit = config.parameters["max_queue_size"].string_value if "max_queue_size" in config.parameters else None
    for descriptor, value in batcher.ListFields():
        where = f"dynamic_batching.{descriptor.name}"
        if descriptor.name == "default_queue_policy" and config.backend == "tensorrtllm":
            if [field.name for field, _ in value.ListFields()] not in ([], ["max_queue_size"]):
                yield where, "has to have max_queue_size alone: the C++ backend reads nothing else"
            elif str(value.max_queue_size) != limit:
                yield f"{where}.max_queue_size", f"is {value.max_queue_size}, and {limit} in parameters max_queue_size"
        elif descriptor.name != "preserve_ordering":
            yield where, "has to be left out: requests that arrive together would be held for up to half a second"
    if config.HasField("dynamic_batching") and not is_ordered and not batcher.ListFields():
        yield "dynamic_batching", f"has no place in {model}: it answers every request by itself"


def _instances(model: str, config: Any) -> Iterator[tuple[str, str]]:
    if model == "ensemble":
        if config.instance_group:
            yield "instance_group", "has no place in an ensemble"
        return
    if len(config.instance_group) != 1:
        yield "instance_group", f"has {len(config.instance_group)} entries, and one is needed"
        return
    group = config.instance_group[0]
    if group.kind != type(group).KIND_CPU:
        yield "instance_group.kind", "has to be KIND_CPU (the executor finds its GPUs itself)"
    if model in _ONE_INSTANCE and group.count != 1:
        yield "instance_group.count", f"is {group.count}; one instance serves all requests at the same time"
    elif not 1 <= group.count <= _MOST_INSTANCES:
        yield "instance_group.count", f"is {group.count}, and 1 to {_MOST_INSTANCES} is reasonable"


def check_tensors(side: str, declared: Any, wanted: tuple[Tensor, ...], where: str) -> Iterator[Problem]:
    """Every declared input or output against the one that is wanted under its name."""
    found: dict[str, Any] = {}
    for tensor in declared:
        if tensor.name in found:
            yield error(where, f"{side} {tensor.name}", "is declared twice")
        found[tensor.name] = tensor
    for tensor in wanted:
        if tensor.name not in found:
            yield error(where, f"{side} {tensor.name}", "is missing")
            continue
        for field, message in _differences(found.pop(tensor.name), tensor):
            yield error(where, f"{side} {tensor.name} {field}", message)
    for name in found:
        yield error(where, f"{side} {name}", f"is no {side} of this model")


def _differences(declared: Any, wanted: Tensor) -> Iterator[tuple[str, str]]:
    dtype = type(declared).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[declared.data_type].name
    if dtype != f"TYPE_{wanted.dtype}":
        yield "data_type", f"is {dtype}, and TYPE_{wanted.dtype} is needed"
    if tuple(declared.dims) != wanted.dims:
        yield "dims", f"is {list(declared.dims)}, and {list(wanted.dims)} is needed"
    if declared.HasField("reshape") != wanted.scalar or list(declared.reshape.shape):
        yield "reshape", f"has to be {'{ shape: [ ] }' if wanted.scalar else 'left out'}"
    for field, value in (("optional", wanted.optional), ("allow_ragged_batch", wanted.ragged)):
        if getattr(declared, field, False) != value:
            yield field, f"has to be {str(value).lower()}"
