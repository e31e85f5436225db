"""The typed model of a repository, and the plan that derives it from an engine. Nothing here touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minitron.errors import UsageError
from minitron_triton.repository import ensemble, parameters, tensors
from minitron_triton.repository.engine_folder import EngineFacts
from minitron_triton.repository.ensemble import EnsembleStep
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.tensors import Tensor

TEXT_MODEL = "tensorrt_llm_bls"
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", TEXT_MODEL)
_BACKEND_KV_CACHE_FRACTION = 0.9  # the C++ backend's own default


@dataclass(frozen=True)
class Queue:
    """Triton's dynamic batcher in front of a model; a ``max_size`` makes it hold requests (see ``_executor_queue``)."""

    max_size: int | None = None
    preserve_ordering: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """What one config.pbtxt says; ``backend`` is empty for an ensemble."""

    name: str
    backend: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    instances: int = 1
    decoupled: bool = False
    queue: Queue | None = None
    steps: tuple[EnsembleStep, ...] = ()


@dataclass(frozen=True)
class Repository:
    """The models, and what else the folder's manifest tells the server."""

    models: tuple[ModelConfig, ...]
    root: str
    engine: EngineFacts
    options: RepositoryOptions
    max_batch_size: int

    @property
    def backend(self) -> str:
        """The backend in the tensorrt_llm slot."""
        return next(model.backend for model in self.models if model.name == "tensorrt_llm")


def plan(engine: EngineFacts, options: RepositoryOptions, *, root: str, add_special_tokens: bool) -> Repository:
    """Derive the models; ``root`` is the folder of the repository as the server will see it.

    Raises UsageError for choices that the engine cannot follow.
    """
    batch = options.max_batch_size or engine.max_batch_size
    if batch > engine.max_batch_size:
        raise UsageError(
            f"max_batch_size {batch} is more than the engine's {engine.max_batch_size}; "
            "choose a smaller one, or build the engine for more"
        )
    tokenizer = {"tokenizer_dir": f"{root}/tokenizer"}
    prompt = {
        "add_special_tokens": _bool(add_special_tokens),
        "max_input_len": str(engine.max_input_len),
        "max_seq_len": str(engine.max_seq_len),
        "vocab_size": str(engine.vocab_size),
    }
    tensorrt_llm = _tensorrt_llm(batch, engine, options, root)
    models = (
        _preprocessing(batch, tokenizer | prompt, options),
        tensorrt_llm,
        _postprocessing(batch, tokenizer, options),
        _ensemble(batch, engine, options),
        _bls(batch, tokenizer | prompt, options, engine, tensorrt_llm.parameters),
    )
    return Repository(models, root, engine, options, batch)


def _preprocessing(batch: int, prompt: dict[str, str], options: RepositoryOptions) -> ModelConfig:
    return ModelConfig(
        "preprocessing", "python", batch, tensors.PREPROCESSING_INPUTS, tensors.PREPROCESSING_OUTPUTS,
        {**prompt, "multimodal_model_path": ""}, instances=options.preprocessing_instances,
    )  # fmt: skip


def _postprocessing(batch: int, tokenizer: dict[str, str], options: RepositoryOptions) -> ModelConfig:
    return ModelConfig(
        "postprocessing", "python", batch, tensors.POSTPROCESSING_INPUTS, tensors.POSTPROCESSING_OUTPUTS,
        {**tokenizer, "skip_special_tokens": _bool(options.skip_special_tokens)},
        instances=options.postprocessing_instances,
        queue=Queue(preserve_ordering=True),  # more than one instance would scramble a stream otherwise
    )  # fmt: skip


def _logits(engine: EngineFacts, options: RepositoryOptions) -> tuple[str, ...]:
    """The kinds of logits that clients may ask for: those that the engine was built to gather.

    None without a limit: one answer of 1,024 tokens takes 1 GB.
    """
    gathered = {"context": engine.gather_context_logits, "generation": engine.gather_generation_logits}
    return tuple(kind for kind, there in gathered.items() if there and options.max_logits_bytes)


def _tensorrt_llm(batch: int, engine: EngineFacts, options: RepositoryOptions, root: str) -> ModelConfig:
    # An engine that gathers context logits was built so by the recipe, for a text model to ask for them.
    kinds = {*_logits(engine, options), *(["context"] if engine.gather_context_logits else [])}
    return ModelConfig(
        "tensorrt_llm", "python" if engine.is_cpu else "tensorrtllm", batch,
        tensors.offered(tensors.ENGINE_INPUTS, kinds),
        tensors.with_logits(tensors.offered(tensors.ENGINE_OUTPUTS, kinds), engine.logits_dtype),
        _engine_parameters(engine, options, root),
        decoupled=True, queue=_executor_queue(engine, options),
    )  # fmt: skip


def _executor_queue(engine: EngineFacts, options: RepositoryOptions) -> Queue | None:
    """The queue policy that the C++ backend takes its executor's limit from, where it is asked for.

    Without a dynamic batcher Triton hands every request on at once. One whose queue has a limit does not: requests that
    come while another is being taken in wait for its next look, half a second by default (dynamic_batch_scheduler.cc of
    Triton's core: no prefetching with a policy; seen on 2.51 in 14 of 60 bursts of four). The backend does without the
    block (model_instance_state.cc: no limit then).
    """
    return Queue(options.max_queue_size) if options.executor_queue_policy and not engine.is_cpu else None


def _engine_parameters(engine: EngineFacts, options: RepositoryOptions, root: str) -> dict[str, str]:
    chunked = engine.paged_context if options.enable_chunked_context is None else options.enable_chunked_context
    if chunked and not (engine.paged_context or engine.is_cpu):
        raise UsageError("enable_chunked_context needs an engine built with --use_paged_context_fmha enable")
    reuses = options.enable_kv_cache_reuse
    reuses = not engine.loses_context_logits if reuses is None else reuses
    values = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{root}/engine",
        "tokenizer_dir": f"{root}/tokenizer",
        "xgrammar_tokenizer_info_path": "",
        "guided_decoding_backend": "",
        "max_beam_width": str(engine.max_beam_width),
        "kv_cache_free_gpu_mem_fraction": str(
            options.kv_cache_free_gpu_mem_fraction or engine.kv_cache_fraction or _BACKEND_KV_CACHE_FRACTION
        ),
        # Shared blocks are read by paged context FMHA, as pieces of a prompt are.
        "enable_kv_cache_reuse": _bool(reuses and (engine.paged_context or engine.is_cpu)),
        "batch_scheduler_policy": options.batch_scheduler_policy,
        "enable_chunked_context": _bool(chunked),
        "decoding_mode": "top_k_top_p" if engine.max_beam_width == 1 else "beam_search",
        # The backend's default normalises log probs over the tokens that sampling keeps: 0 for every greedy token.
        "normalize_log_probs": "false",
        "exclude_input_in_output": _bool(options.exclude_input_in_output),
        "cancellation_check_period_ms": str(options.cancellation_check_period_ms),
        "stats_check_period_ms": str(options.stats_check_period_ms),
        "max_queue_size": str(options.max_queue_size),
    }
    if options.max_tokens_in_paged_kv_cache is not None:
        values["max_tokens_in_paged_kv_cache"] = str(options.max_tokens_in_paged_kv_cache)
    if options.speculation != "none":
        if not engine.is_cpu:
            raise UsageError(
                f"speculation {options.speculation} is the CPU engine's, and this one is TensorRT's: leave it out"
            )
        values["speculation"] = options.speculation
    values |= options.parameters
    wrong = parameters.problems("tensorrt_llm", values, parameters.ENGINE)
    if wrong:
        raise UsageError("; ".join(f"parameter {key} {problem}" for key, problem in wrong))
    return values


def _bls(
    batch: int,
    prompt: dict[str, str],
    options: RepositoryOptions,
    engine: EngineFacts,
    engine_parameters: Mapping[str, str],
) -> ModelConfig:
    kinds = _logits(engine, options)
    values = {
        "tensorrt_llm_model_name": "tensorrt_llm",
        **prompt,
        "skip_special_tokens": _bool(options.skip_special_tokens),
        "exclude_input_in_output": _bool(options.exclude_input_in_output),
        "max_concurrency": str(options.bls_max_concurrency),
        "max_queue_size": str(options.max_queue_size),
        "max_logits_bytes": str(options.max_logits_bytes if kinds else 0),
        "cancellation_check_period_ms": str(options.cancellation_check_period_ms),
        "context_logits": engine.context_logits(engine_parameters["enable_kv_cache_reuse"]),
    }
    outputs = tensors.with_logits(tensors.offered(tensors.TEXT_OUTPUTS, kinds), engine.logits_dtype)
    inputs = tensors.offered(tensors.BLS_INPUTS, kinds)
    return ModelConfig(TEXT_MODEL, "python", batch, inputs, outputs, values, decoupled=True)


def _ensemble(batch: int, engine: EngineFacts, options: RepositoryOptions) -> ModelConfig:
    kinds = _logits(engine, options)
    outputs = tensors.with_logits(tensors.offered(tensors.TEXT_OUTPUTS, kinds), engine.logits_dtype)
    inputs = tensors.offered(tensors.ENSEMBLE_INPUTS, kinds)
    return ModelConfig("ensemble", "", batch, inputs, outputs, steps=ensemble.steps(kinds))


def _bool(value: bool) -> str:
    return "true" if value else "false"
