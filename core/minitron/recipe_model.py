"""The fields of a recipe: every one described, unknown keys forbidden, values frozen and of exactly the type named.

The models are pydantic's: it names the place of an error, checks types strictly and forbids unknown keys, which by hand
would be a validator of our own for every nested field. How the layers of a recipe are applied is in ``recipe``.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minitron.machine.memory import LEAST_SHM_BYTES
from minitron.model.precision import WRITTEN, Precision
from minitron.text.channel import GRPC_PORT, HTTP_PORT, METRICS_PORT


def _field(default: Any, about: str, *, flag: str | None = None, dest: str | None = None, **limits: Any) -> Any:
    """A described field; ``flag`` and ``dest`` where they differ from the field's own name."""
    return Field(default, description=about, json_schema_extra={"flag": flag, "dest": dest}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Section):
    """Which model, and where its sizes come from before it is here."""

    source: str = _field(
        "nvidia/Minitron-4B-Base", "local folder, GGUF file or Hugging Face id", flag="--model", dest="model"
    )
    revision: str | None = _field(None, "branch, tag or commit of a Hugging Face id; none takes its main branch")
    activations: str | None = _field(
        None, "what 'minitron eval --activations' measured of this model: the plan and convert warn of float16 by it"
    )
    published_shape: str = _field(
        "minitron-4b-base", "data file with the published sizes, used for planning while no config.json is at hand"
    )


class Percentiles(_Section):
    """Token counts of a workload by percentile; the longest one sets the limits of the engine."""

    p50: int = _field(..., "median number of tokens", ge=1)
    p95: int | None = _field(None, "95th percentile", ge=1)
    max: int = _field(..., "longest one that must be served", ge=1)

    @model_validator(mode="after")
    def _ascending(self) -> Percentiles:
        if not self.p50 <= (self.p95 or self.p50) <= self.max or self.p50 > self.max:
            raise ValueError(f"p50 {self.p50}, p95 {self.p95} and max {self.max} do not ascend")
        return self


class Workload(_Section):
    """What the engine is planned for; without lengths, for whatever the model can take."""

    concurrency: int = _field(16, "sequences that are to be generated at the same time", ge=1)
    input_tokens: int | Percentiles | None = _field(None, "prompt length in tokens: a number, or {p50, p95, max}")
    output_tokens: int | Percentiles | None = _field(None, "generated tokens: a number, or {p50, p95, max}")

    @model_validator(mode="after")
    def _positive(self) -> Workload:
        for name in ("input_tokens", "output_tokens"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}, and at least 1 is needed")
        return self


class Limits(_Section):
    """Limits of the engine; one that is not set is derived from the workload by the plan."""

    max_batch_size: int | None = _field(None, "sequences in one step of the engine", ge=1)
    max_input_len: int | None = _field(None, "longest prompt in tokens", ge=1)
    max_seq_len: int | None = _field(None, "longest prompt and output together, in tokens", ge=2)
    max_num_tokens: int | None = _field(None, "tokens of all sequences together in one step", ge=32)


class Memory(_Section):
    """What the plan adds for what cannot be computed exactly."""

    kv_cache_fraction: float | None = _field(
        None, "kv_cache_free_gpu_mem_fraction; derived from the concurrency when not set", gt=0, le=1
    )
    max_kv_cache_fraction: float = _field(0.9, "largest fraction that the plan may derive", gt=0, le=1)
    activation_margin: float = _field(0.3, "added to the activation estimate, as a share of it", ge=0, le=10)
    runtime_bytes: int = _field(
        1 << 30, "estimate for CUDA context, TensorRT, cuBLAS and NCCL buffers of one GPU, in bytes", ge=0
    )


class Calibration(_Section):
    """The text that int4_awq and an int8 KV cache are calibrated with, like the texts that will be served."""

    text: str | None = _field(
        None, 'UTF-8 text, or *.jsonl with a "text" on each line', flag="--calibration", dest="calibration"
    )
    sequences: int = _field(
        32, "sequences that are taken of it", flag="--calibration-sequences", dest="calibration_sequences", ge=1
    )
    tokens: int = _field(512, "tokens of each", flag="--calibration-tokens", dest="calibration_tokens", ge=2)


class Cpu(_Section):
    """How the CPU engine calculates; other targets ignore it."""

    execution: Literal["exact", "fast"] = _field(
        "exact", "exact: float32 arithmetic, what the checkpoint says; fast: bf16 arithmetic and 8-bit KV cache"
    )
    lm_head: Literal["auto", "as_is", "int8", "screened"] = _field(
        "auto",
        "the output head: as_is, the checkpoint's 16 bits; screened, an int8 copy that finds the words that matter, "
        "and the 16-bit rows of those; int8, the copy alone, which the checkpoint does not hold; auto: screened where "
        "execution is fast, as_is where it is exact",
        flag="--head", dest="lm_head",
    )  # fmt: skip
    overflow: Literal["none", "float16"] = _field(
        "none", "float16: what a float16 network could not hold becomes infinite, as it would on a GPU"
    )


class Serving(_Section):
    """The Triton model repository and the server."""

    grpc_port: int = _field(GRPC_PORT, "gRPC port; 0 takes a free one", ge=0, le=65535)
    http_port: int = _field(HTTP_PORT, "HTTP port; 0 takes a free one", ge=0, le=65535)
    metrics_port: int = _field(METRICS_PORT, "Prometheus port; 0 takes a free one", ge=0, le=65535)
    max_queue_size: int = _field(256, "requests that may wait before the server says it is full; 0: no limit", ge=0)
    executor_queue_policy: bool = _field(
        False,
        "let a TensorRT engine's executor refuse what is above max_queue_size: its backend reads that from Triton's "
        "queue policy only, and with one Triton at times holds requests that come together for up to half a second; "
        "without, the text model's limit is the only one. (A CPU engine reads max_queue_size itself.)",
    )
    speculation: Literal["none", "prompt_lookup"] = _field(
        "none",
        "prompt_lookup: a CPU engine drafts tokens from where the text stood before, and keeps those that are right: "
        "the same greedy tokens, faster for one stream that repeats itself or its prompt, much slower for several",
    )
    max_logits_bytes: int = _field(
        0,
        "bytes of logits that one request may ask for (vocabulary x 4 for each token: 1.02 MB for Minitron-4B); with 0 "
        "the server does not offer them",
        ge=0,
    )
    preprocessing_instances: int = _field(1, "processes that tokenize", ge=1)
    postprocessing_instances: int = _field(1, "processes that detokenize for the ensemble", ge=1)
    bls_max_concurrency: int = _field(128, "requests that the front works on at the same time", ge=1)
    exit_timeout_s: int = _field(
        30, "seconds that running requests get to finish when the server is stopped", flag="--exit-timeout", ge=1
    )


class Container(_Section):
    """The pinned image that builds and serves on a GPU."""

    image_tag: str | None = _field(None, "tag of the Triton image; none takes the newest that can build engines")
    image: str | None = _field(
        None,
        "NAME:TAG of an image derived from the pinned one, to serve in its place ('minitron serve DIR --dockerfile')",
    )
    environment: dict[str, str] = _field(
        {},
        "further environment of the containers that build and serve, such as {UCX_TLS: tcp} where UCX fails on a host "
        "with InfiniBand (TensorRT-LLM#3112); no place for secrets",
    )
    shm_bytes: int = _field(2 << 30, "size of /dev/shm in the container, in bytes", ge=LEAST_SHM_BYTES)

    @field_validator("image")
    @classmethod
    def _whole(cls, image: str | None) -> str | None:
        if image is not None and not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*:\w[\w.-]*", image, re.ASCII):
            raise ValueError(f"{image!r} is no NAME:TAG of an image")
        return image

    @field_validator("environment")
    @classmethod
    def _names(cls, environment: dict[str, str]) -> dict[str, str]:
        if wrong := next((name for name in environment if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)), None):
            raise ValueError(f"{wrong!r} is no name of an environment variable")
        return environment


class Recipe(_Section):
    """Everything that is wanted, from the weights to the server."""

    model: Model = Model()
    precision: Literal["auto", "float16", "bfloat16", "int8_weight_only", "int4_weight_only", "int4_awq"] = _field(
        "auto", "how the linear weights are stored; auto follows the model"
    )
    dtype: Literal["auto", "float16", "bfloat16"] = _field("auto", "activation type; auto follows the model")
    group_size: Literal[64, 128] | None = _field(
        None, "inputs that share a 4-bit scale: none is a whole channel for int4_weight_only, and 128 for int4_awq"
    )
    kv_cache: Literal["auto", "int8"] = _field(
        "auto", "int8 keeps keys and values in 8 bits, with a scale a layer from the calibration; auto in dtype"
    )
    calibration: Calibration = Calibration()
    target: str = _field("cpu", "what the engine runs on: cpu, or a GPU of data/gpus.yaml such as a100-80gb")
    backend: Literal["engine", "llmapi"] = _field(
        "engine", "engine: TensorRT (or OpenVINO on a CPU); llmapi: TensorRT-LLM's PyTorch path, the only one from 1.3"
    )
    tensor_parallel: int = _field(1, "GPUs that share every layer", flag="--tp", dest="tp", ge=1)
    pipeline_parallel: int = _field(1, "GPUs that take the layers in turn", flag="--pp", dest="pp", ge=1)
    use_parallel_embedding: bool = _field(False, "split the embedding over the GPUs of tensor_parallel")
    embedding_sharding_dim: Literal[0, 1] = _field(0, "dimension that use_parallel_embedding splits: 0 rows, 1 columns")
    workload: Workload = Workload()
    limits: Limits = Limits()
    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    serving: Serving = Serving()
    container: Container = Container()
    trtllm_build: dict[str, bool | int | str] = _field(
        {}, "further flags of trtllm-build, without the dashes: {multiple_profiles: enable}; the plan sets the limits"
    )

    @property
    def is_weight_only(self) -> bool:
        """Whether a precision is asked for that stores codes; an ``auto`` follows the model, which has none."""
        return self.precision != "auto" and Precision(self.precision).is_weight_only

    @model_validator(mode="after")
    def _combination(self) -> Recipe:
        if self.backend == "llmapi" and self.kv_cache != "auto":
            raise ValueError("kv_cache int8 is a checkpoint's, and llmapi takes the model itself; leave it out")
        if self.group_size and not (self.is_weight_only and Precision(self.precision).takes_group_size):
            names = " and ".join(one.value for one in WRITTEN if one.takes_group_size)
            raise ValueError(f"group_size {self.group_size} goes with {names}")
        if self.backend == "llmapi" and self.is_weight_only:
            raise ValueError(f"precision {self.precision} needs a TensorRT engine; llmapi takes float16 or bfloat16")
        if self.dtype != "auto" and self.precision in ("float16", "bfloat16") and self.dtype != self.precision:
            raise ValueError(f"dtype {self.dtype} does not go with precision {self.precision}; leave dtype out")
        return self
