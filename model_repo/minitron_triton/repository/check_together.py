"""The configs against each other, against the engine and against what the manifest tells the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minitron.artifacts.problem import Problem, error, warning
from minitron_triton.repository import parameters
from minitron_triton.repository.check_config import logits_offered
from minitron_triton.repository.engine_folder import EngineFacts
from minitron_triton.repository.ensemble import steps as ensemble_steps

Configs = Mapping[str, Any]

#: Parameters that have to be the same in two models, because both do the same work.
_SAME = (
    ("add_special_tokens", "preprocessing", "tensorrt_llm_bls"),
    ("skip_special_tokens", "postprocessing", "tensorrt_llm_bls"),
    ("exclude_input_in_output", "tensorrt_llm", "tensorrt_llm_bls"),
    ("cancellation_check_period_ms", "tensorrt_llm", "tensorrt_llm_bls"),
    ("max_queue_size", "tensorrt_llm", "tensorrt_llm_bls"),
)


def check(configs: Configs, engine: EngineFacts | None, details: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go together; ``details`` are those of the repository's manifest."""
    yield from _batches(configs)
    yield from _paths(configs, str(details.get("root", "")))
    yield from _shared_parameters(configs)
    if engine is not None:
        yield from _limits(configs, engine)
    yield from _front(configs)
    yield from _logits(configs, engine)
    if "ensemble" in configs:
        yield from _ensemble(configs["ensemble"])


def _parameter(configs: Configs, model: str, key: str) -> str | None:
    config = configs.get(model)
    return config.parameters[key].string_value if config is not None and key in config.parameters else None


def _at(model: str, field: str, message: str) -> Problem:
    return error(f"{model}/config.pbtxt", field, message)


def _batches(configs: Configs) -> Iterator[Problem]:
    sizes = {model: config.max_batch_size for model, config in configs.items()}
    usual = max(sizes.values(), key=list(sizes.values()).count, default=0)
    for model, size in sizes.items():
        if size != usual:
            yield _at(
                model, "max_batch_size", f"is {size}, and {usual} in the other models: they take the same batches"
            )


def _paths(configs: Configs, root: str) -> Iterator[Problem]:
    wanted = [(model, "tokenizer_dir", f"{root}/tokenizer") for model in configs if model != "ensemble"]
    wanted.append(("tensorrt_llm", "gpt_model_path", f"{root}/engine"))
    for model, key, path in wanted:
        value = _parameter(configs, model, key)
        if value is not None and value != path:
            yield _at(model, f"parameters {key}", f"is {value!r}, and the repository was rendered for {path!r}")


def _shared_parameters(configs: Configs) -> Iterator[Problem]:
    for key, one, other in _SAME:
        values = _parameter(configs, one, key), _parameter(configs, other, key)
        if None not in values and values[0] != values[1]:
            yield _at(other, f"parameters {key}", f"is {values[1]!r}, and {values[0]!r} in {one}")


def _limits(configs: Configs, engine: EngineFacts) -> Iterator[Problem]:
    limits = {"max_input_len": engine.max_input_len, "max_seq_len": engine.max_seq_len, "vocab_size": engine.vocab_size}
    for model in ("preprocessing", "tensorrt_llm_bls"):
        for key, limit in limits.items():
            value = _parameter(configs, model, key)
            if value is not None and value != str(limit):
                yield _at(model, f"parameters {key}", f"is {value!r}, and the engine says {limit}")
    beams = _parameter(configs, "tensorrt_llm", "max_beam_width")
    if beams is not None and beams != str(engine.max_beam_width):
        yield _at("tensorrt_llm", "parameters max_beam_width", f"is {beams!r}, the engine's is {engine.max_beam_width}")
    mode = _parameter(configs, "tensorrt_llm", "decoding_mode")
    if mode is not None and (mode == "beam_search") != (engine.max_beam_width > 1):
        yield _at("tensorrt_llm", "parameters decoding_mode", f"is {mode!r}, with {engine.max_beam_width} beams")
    chunked = _parameter(configs, "tensorrt_llm", "enable_chunked_context")
    if parameters.is_true(chunked) and not (engine.paged_context or engine.is_cpu):
        yield _at("tensorrt_llm", "parameters enable_chunked_context", "needs an engine built with paged context FMHA")
    reuses = _parameter(configs, "tensorrt_llm", "enable_kv_cache_reuse")
    logits = _parameter(configs, "tensorrt_llm_bls", "context_logits")
    if None not in (reuses, logits) and logits != (right := engine.context_logits(str(reuses))):
        message = f"is {logits!r}, and {right!r} is what the engine gives with enable_kv_cache_reuse {reuses!r}"
        yield _at("tensorrt_llm_bls", "parameters context_logits", message)


def _front(configs: Configs) -> Iterator[Problem]:
    engine_name = _parameter(configs, "tensorrt_llm_bls", "tensorrt_llm_model_name")
    if engine_name is not None and engine_name not in configs:
        yield _at("tensorrt_llm_bls", "parameters tensorrt_llm_model_name", f"names {engine_name!r}, which is not here")


def _logits(configs: Configs, engine: EngineFacts | None) -> Iterator[Problem]:
    """Who may ask for logits: what the engine has, through the text models within a limit."""
    limit = _parameter(configs, "tensorrt_llm_bls", "max_logits_bytes")
    own = logits_offered(configs["tensorrt_llm"]) if "tensorrt_llm" in configs else None
    for model in ("tensorrt_llm_bls", "ensemble"):
        kinds = logits_offered(configs[model]) if model in configs else set()
        if own is not None and not kinds <= own:
            yield _at(model, "input", f"offers {', '.join(sorted(kinds - own))} logits, and tensorrt_llm does not")
        if kinds and limit == "0":
            yield _at(model, "input", "offers logits, and parameters max_logits_bytes of tensorrt_llm_bls is 0")
    if own and "generation" in own and limit == "0":
        yield _at(
            "tensorrt_llm", "input", "offers generation logits, which a recipe asks for by serving.max_logits_bytes"
        )
    if "tensorrt_llm_bls" in configs and limit not in (None, "0") and not logits_offered(configs["tensorrt_llm_bls"]):
        yield _at("tensorrt_llm_bls", "parameters max_logits_bytes", f"is {limit}, and no logits are offered")
    gathered = (
        {"context": engine.gather_context_logits, "generation": engine.gather_generation_logits} if engine else {}
    )
    for kind in sorted(own or ()):
        if not gathered.get(kind, True):
            yield _at("tensorrt_llm", "input", f"offers {kind} logits, and the engine was not built to gather them")


def _ensemble(config: Any) -> Iterator[Problem]:
    steps, where = list(config.ensemble_scheduling.step), "ensemble_scheduling.step"
    names, needed = [step.model_name for step in steps], ensemble_steps(logits_offered(config))
    if names != [step.model for step in needed]:
        yield _at("ensemble", f"{where} model_name", f"are {names}, and {[step.model for step in needed]} are needed")
        return
    for step, wanted in zip(steps, needed, strict=True):
        if step.model_version not in (-1, 1):
            yield _at(
                "ensemble", f"{where} {step.model_name} model_version", f"is {step.model_version}; there is only 1"
            )
        for field, declared, maps in (
            ("input_map", dict(step.input_map), wanted.inputs),
            ("output_map", dict(step.output_map), wanted.outputs),
        ):
            for key in sorted(set(declared) | set(maps)):
                if declared.get(key) != maps.get(key):
                    has, needs = declared.get(key, "nothing"), maps.get(key, "nothing")
                    yield _at(
                        "ensemble", f"{where} {step.model_name} {field} {key}", f"is {has}, and {needs} is needed"
                    )
    yield warning(
        "ensemble/config.pbtxt", "", "a stream through the ensemble loses spaces and characters that are split across "
        "tokens, and cannot be cancelled; use tensorrt_llm_bls",
    )  # fmt: skip
