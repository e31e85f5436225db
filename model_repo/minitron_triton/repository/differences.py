"""A config.pbtxt against the one that is rendered for the same engine and options, field by field.

What may be edited by hand is said, not refused; of everything else a reader learns why it has to be as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minitron.artifacts.problem import Problem, error, warning

#: Triton's fields that our templates write; another may be well meant, but nobody here has looked at it.
_KNOWN = {
    "name", "backend", "platform", "max_batch_size", "input", "output", "parameters", "instance_group",
    "dynamic_batching", "model_transaction_policy", "ensemble_scheduling",
}  # fmt: skip
#: Fields that the bundled server (2.51, Triton 24.10) does not know, so that it loads nothing: since which release.
_NEWER = {"model_metrics": "24.11"}
_MOST_INSTANCES = 256
#: Why a field has to be as it was rendered, by the beginning of its name; the first that fits. For one model, or all.
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("name", "", "write the folder's name"),
    ("backend", "", "it runs what lies here"),
    ("platform", "", "it runs what lies here"),
    ("model_transaction_policy", "", "answers of tensorrt_llm and tensorrt_llm_bls are streamed, others are one"),
    ("dynamic_batching.preserve_ordering", "postprocessing", "or the tokens of a stream overtake each other"),
    ("dynamic_batching.preserve_ordering", "", "whole streams would be answered one after the other"),
    ("dynamic_batching", "", "requests that arrive together would be held for up to half a second"),
    ("instance_group.kind", "", "the executor finds its GPUs itself"),
    ("instance_group", "", "one instance serves all requests at the same time"),
    ("parameters tokenizer_dir", "", "it was rendered for that folder; --root of 'minitron render' gives another"),
    ("parameters gpt_model_path", "", "it was rendered for that folder; --root of 'minitron render' gives another"),
    ("parameters max_logits_bytes", "", "whether logits are offered is decided by 'minitron render'"),
    ("parameters max_", "", "it is the engine's own limit"),
    ("parameters vocab_size", "", "it is the engine's own limit"),
    ("ensemble_scheduling", "", "that is how the models' tensors belong together"),
    ("input", "", "the models and their clients know it so"),
    ("output", "", "the models and their clients know it so"),
)
#: Parameters that are a choice, as long as their reader understands them.
_CHOICES = {
    "kv_cache_free_gpu_mem_fraction", "max_tokens_in_paged_kv_cache", "kv_cache_host_memory_bytes",
    "kv_cache_onboard_blocks", "max_attention_window_size", "sink_token_length", "enable_kv_cache_reuse",
    "batch_scheduler_policy", "enable_chunked_context", "decoding_mode", "normalize_log_probs", "add_special_tokens",
    "skip_special_tokens", "exclude_input_in_output", "cancellation_check_period_ms", "stats_check_period_ms",
    "max_queue_size", "speculation", "max_concurrency", "recv_poll_period_ms", "iter_stats_max_iterations",
    "request_stats_max_iterations", "enable_trt_overlap", "gpu_device_ids", "participant_ids", "num_nodes",
    "executor_worker_path", "multi_block_mode", "enable_context_fmha_fp32_acc", "cuda_graph_mode",
    "cuda_graph_cache_size", "gpu_weights_percent", "FORCE_CPU_ONLY_INPUT_TENSORS", "grpc_url", "grpc_ca", "grpc_cert",
    "grpc_key", "grpc_api_key_file", "grpc_authority",
    "context_logits",  # follows from another choice; ``check`` holds it against that
}  # fmt: skip
_NOTHING = "nothing"


def differences(model: str, found: Any, rendered: Any, *, bundled: bool) -> Iterator[Problem]:
    """What the config ``found`` of ``model`` says otherwise than ``rendered`` does (both ``inference.ModelConfig``).

    ``bundled``: whether it is for the server of nvidia-pytriton's wheel.
    """
    where = f"{model}/config.pbtxt"
    for descriptor, _ in found.ListFields():
        if bundled and descriptor.name in _NEWER:
            since = f"is known from {_NEWER[descriptor.name]} on; the bundled server loads no model that has it"
            yield error(where, descriptor.name, since)
        elif descriptor.name not in _KNOWN:
            yield warning(where, descriptor.name, "is not a field that this toolkit sets or has looked at")
    for field, has, wanted in _message(found, rendered, ""):
        if _is_choice(model, field, has, wanted):
            yield warning(where, field, f"was edited: it is {has}, and {wanted} was rendered")
        else:
            why = next((why for start, of, why in _REASONS if field.startswith(start) and of in ("", model)), "")
            yield error(where, field, f"is {has}, and {wanted} is needed" + (f": {why}" if why else ""))


def _is_choice(model: str, field: str, has: str, wanted: str) -> bool:
    """Whether a difference is one that somebody may want; whether its value can be is judged elsewhere."""
    kind, _, key = field.partition(" ")
    if kind == "parameters":
        both = "0" not in (has.strip("'"), wanted.strip("'")) and _NOTHING not in (has, wanted)
        return key in _CHOICES or (key == "max_logits_bytes" and both)
    if field == "instance_group.count":
        return model in ("preprocessing", "postprocessing") and 1 <= int(has) <= _MOST_INSTANCES
    # Held against the engine, the other models and the parameter of that name (``check``).
    return field in ("max_batch_size", "dynamic_batching.default_queue_policy.max_queue_size")


def _message(found: Any, rendered: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(field, what it is, what was rendered) of every field that differs."""
    fields = {field.name: field for message in (found, rendered) for field, _ in message.ListFields()}
    for name, field in fields.items():
        if path or name in _KNOWN:
            yield from _field(field, getattr(found, name), getattr(rendered, name), f"{path}{name}", (found, rendered))


def _field(field: Any, has: Any, wanted: Any, path: str, holders: tuple[Any, Any]) -> Iterator[tuple[str, str, str]]:
    of_messages = field.message_type is not None
    if of_messages and field.message_type.GetOptions().map_entry:
        yield from _map(has, wanted, path)
    elif field.is_repeated and of_messages:
        yield from _list(list(has), list(wanted), path)
    elif field.is_repeated:
        if list(has) != list(wanted):
            yield path, str(list(has)), str(list(wanted))
    elif of_messages:
        there = [holder.HasField(field.name) for holder in holders]
        if all(there):
            yield from _message(has, wanted, path + ".")
        elif "." in path or " " in path or not (has.ListFields() or wanted.ListFields()):
            yield path, _there(there[0]), _there(there[1])
        else:
            for inner, _ in (has if there[0] else wanted).ListFields():
                yield f"{path}.{inner.name}", _there(there[0]), _there(there[1])
    elif has != wanted:
        yield path, _shown(field, has), _shown(field, wanted)


def _map(has: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for key in sorted({*has, *wanted}):
        one, other = (repr(_plain(side[key])) if key in side else _NOTHING for side in (has, wanted))
        if one != other:
            yield f"{path} {key}", one, other


def _plain(value: Any) -> Any:
    """A parameter's text; of the ensemble's maps the value itself."""
    return value.string_value if hasattr(value, "string_value") else value


def _list(has: list[Any], wanted: list[Any], path: str) -> Iterator[tuple[str, str, str]]:
    """Messages that have a name of their own are compared by it, others by their place."""
    if path == "instance_group":
        if len(has) != len(wanted):
            yield path, f"{len(has)} entries", str(len(wanted))
        for one, other in zip(has, wanted, strict=False):
            yield from _message(one, other, f"{path}.")
        return
    key = "model_name" if path.endswith("step") else "name"
    names, needed = ([getattr(one, key) for one in side] for side in (has, wanted))
    if (path.endswith("step") and names != needed) or len(set(names)) < len(names):
        yield f"{path} {key}", str(names), str(needed)
        return
    for name in dict.fromkeys([*needed, *names]):
        if name not in names or name not in needed:
            yield f"{path} {name}", _there(name in names), _there(name in needed)
        else:
            yield from _message(has[names.index(name)], wanted[needed.index(name)], f"{path} {name} ")


def _there(is_there: bool) -> str:
    return "set" if is_there else _NOTHING


def _shown(field: Any, value: Any) -> str:
    if field.enum_type is not None:
        return str(field.enum_type.values_by_number[value].name)
    return str(value).lower() if isinstance(value, bool) else repr(value)
