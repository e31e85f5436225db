"""What a user (or a recipe) may choose about a repository; everything else follows from the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron.errors import UsageError
from minitron.recipe_model import Container, Recipe, Serving
from minitron_triton.repository import parameters

_SERVING = Serving()  # the defaults of what a recipe decides stand there only

#: Newest image with the engine path (TensorRT-LLM 1.2.1).
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


def _option(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class RepositoryOptions:
    """Serving choices; None means "what the engine says" (or the backend's own default). Raises UsageError."""

    max_batch_size: int | None = _option(None, "largest batch of one request, at most the engine's")
    preprocessing_instances: int = _option(
        _SERVING.preprocessing_instances, "instances of preprocessing, which only the ensemble uses"
    )
    postprocessing_instances: int = _option(
        _SERVING.postprocessing_instances, "instances of postprocessing, which only the ensemble uses"
    )
    bls_max_concurrency: int = _option(_SERVING.bls_max_concurrency, "requests that the BLS works on at the same time")
    max_queue_size: int = _option(
        _SERVING.max_queue_size, "requests that may wait in the engine, and in the BLS; more are refused; 0 = no limit"
    )
    max_logits_bytes: int = _option(
        _SERVING.max_logits_bytes, "bytes of logits that one request may ask for; 0: they are not offered"
    )
    executor_queue_policy: bool = _option(
        _SERVING.executor_queue_policy, "let a TensorRT engine's executor have the limit too, at the price of waits"
    )
    speculation: str = _option(
        _SERVING.speculation, "prompt_lookup: a CPU engine drafts tokens from where the text stood before; or none"
    )
    kv_cache_free_gpu_mem_fraction: float | None = _option(
        None,
        "share of the GPU memory left after loading that the KV cache takes; unset: what the engine was planned for",
    )
    max_tokens_in_paged_kv_cache: int | None = _option(None, "tokens that the KV cache holds; unset: bounded by memory")
    enable_kv_cache_reuse: bool | None = _option(
        None,
        "share the KV cache of equal prompt beginnings; unset: yes, save for a TensorRT engine that gathers context "
        "logits, which it has not for what it shares",
    )
    batch_scheduler_policy: str = _option("guaranteed_no_evict", "or max_utilization, which pauses requests when full")
    enable_chunked_context: bool | None = _option(None, "split long prompts; unset: where the engine can")
    exclude_input_in_output: bool = _option(True, "leave the prompt out of non-streamed answers, unless a request asks")
    skip_special_tokens: bool = _option(True, "leave special tokens such as the end token out of the text")
    cancellation_check_period_ms: int = _option(100, "milliseconds between two looks for cancelled requests")
    stats_check_period_ms: int = _option(100, "milliseconds between two updates of the engine's metrics")
    environment: Mapping[str, str] = field(
        default_factory=dict, metadata={"about": "further environment of the container that serves (compose file)"}
    )
    image: str = _option(IMAGE, "container image that serves a GPU engine")
    derived_image: str | None = _option(None, "one derived from it, which serves in its place")
    shm_bytes: int = _option(Container().shm_bytes, "size of /dev/shm in the container")
    parameters: Mapping[str, str] = field(
        default_factory=dict, metadata={"about": "further parameters of the TensorRT-LLM backend"}
    )

    @property
    def serving_image(self) -> str:
        """The image that the container is made of."""
        return self.derived_image or self.image

    def __post_init__(self) -> None:
        for name in ("preprocessing_instances", "postprocessing_instances", "bls_max_concurrency",
                     "cancellation_check_period_ms", "stats_check_period_ms"):  # fmt: skip
            _at_least(1, name, getattr(self, name))
        _at_least(0, "max_queue_size", self.max_queue_size)
        _at_least(0, "max_logits_bytes", self.max_logits_bytes)
        for name in ("max_batch_size", "max_tokens_in_paged_kv_cache"):
            if getattr(self, name) is not None:
                _at_least(1, name, getattr(self, name))
        fraction = self.kv_cache_free_gpu_mem_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise UsageError(f"kv_cache_free_gpu_mem_fraction is {fraction}: a share above 0, at most 1, is needed")
        for name in ("batch_scheduler_policy", "speculation"):
            if problem := parameters.ENGINE[name].problem(getattr(self, name)):
                raise UsageError(f"{name} {problem}")


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}, and at least {least} is needed")


#: Fields of a recipe that are options of a repository under another name, or under the same one.
FROM_RECIPE = {
    "serving.max_queue_size": "max_queue_size",
    "serving.max_logits_bytes": "max_logits_bytes",
    "serving.executor_queue_policy": "executor_queue_policy",
    "serving.speculation": "speculation",
    "serving.preprocessing_instances": "preprocessing_instances",
    "serving.postprocessing_instances": "postprocessing_instances",
    "serving.bls_max_concurrency": "bls_max_concurrency",
    "container.environment": "environment",
    "memory.kv_cache_fraction": "kv_cache_free_gpu_mem_fraction",
    "container.shm_bytes": "shm_bytes",
    "container.image": "derived_image",
}


def from_recipe(recipe: Recipe, **others: Any) -> RepositoryOptions:
    """The options that ``recipe`` holds, and ``others`` that no recipe knows; raises UsageError."""
    values = {}
    for path, name in FROM_RECIPE.items():
        section, _, field_name = path.partition(".")
        values[name] = getattr(getattr(recipe, section), field_name)
    if recipe.container.image_tag is not None:
        values["image"] = f"{IMAGE.partition(':')[0]}:{recipe.container.image_tag}"
    return RepositoryOptions(**values, **others)
