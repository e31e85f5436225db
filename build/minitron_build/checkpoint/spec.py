"""What checkpoint to make of a model, and the config.json that says so.

Source of the keys: TensorRT-LLM 1.2.0rc2 ``tensorrt_llm/models/modeling_utils.py`` (PretrainedConfig, QuantConfig) and
``mapping.py``, 1.x ``models/gpt/config.py``. Written is the subset that every 1.x and late 0.x version loads: inside
``mapping`` and ``quantization`` an unknown key makes loading fail, while a missing one takes its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron.errors import UsageError
from minitron.model.precision import GROUP_SIZES, Precision
from minitron.model.shape import ARCHITECTURE, ModelShape

_WEIGHT_ONLY_MULTIPLE = 64


@dataclass(frozen=True)
class Spec:
    """A checkpoint of ``shape``: linear weights in ``precision``, all else in ``dtype``, for tp x pp ranks.

    ``quantize_at_build`` leaves the linear weights in ``dtype`` for trtllm-build to quantise. ``group_size``: inputs
    that share a 4-bit scale (None: those of a whole channel do). ``kv_cache``: "INT8" keeps keys and values in 8 bits,
    as does "FP8", which is read and not written; None keeps them in ``dtype``. Raises UsageError for a combination that
    TensorRT-LLM cannot run.
    """

    shape: ModelShape
    precision: Precision
    dtype: str
    tp: int = 1
    pp: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    quantize_at_build: bool = False
    group_size: int | None = None
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        self._check_ranks()
        self._check_group()
        if self.precision.weight_bits < 16:
            self._check_multiples()
        elif self.quantize_at_build:
            raise UsageError(f"--quantize-at-build needs a weight-only --precision, not {self.precision.value}")
        elif self.precision.value != self.dtype:
            raise UsageError(f"--dtype {self.dtype} contradicts --precision {self.precision.value}; leave --dtype out")

    @property
    def world_size(self) -> int:
        """Number of ranks, each with a file of its own."""
        return self.tp * self.pp

    @property
    def writes_codes(self) -> bool:
        """Whether linear weights are written as codes and scales."""
        return self.precision.weight_bits < 16 and not self.quantize_at_build

    def _check_ranks(self) -> None:
        shape, tp = self.shape, self.tp
        if tp < 1 or self.pp < 1:
            raise UsageError(f"--tp {tp} --pp {self.pp}: both must be at least 1")
        for what, count in (("attention heads", shape.num_heads), ("intermediate elements", shape.intermediate_size)):
            if count % tp:
                raise UsageError(f"--tp {tp} does not divide the model's {count} {what}")
        if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
            raise UsageError(
                f"--tp {tp} neither divides the model's {shape.num_kv_heads} key/value heads nor is a multiple"
            )
        if self.pp > shape.num_layers:
            raise UsageError(f"--pp {self.pp} is more than the model's {shape.num_layers} layers")

    def _check_group(self) -> None:
        if self.group_size is None:
            if self.precision.default_group_size:
                raise UsageError(f"--precision {self.precision.value} needs a --group-size")
            return
        if self.precision.weight_bits != 4 or self.group_size not in GROUP_SIZES:
            sizes = " or ".join(map(str, GROUP_SIZES))
            raise UsageError(f"--group-size {self.group_size} with --precision {self.precision.value}: groups are of "
                             f"{sizes}, and for int4_weight_only and int4_awq")  # fmt: skip
        if self.quantize_at_build:
            raise UsageError(
                "--quantize-at-build makes one scale a channel; leave --group-size out (groups fit any GPU)"
            )
        hidden, inner = self.shape.hidden_size, self.shape.intermediate_size
        for module, inputs in (("qkv", hidden), ("dense", hidden // self.tp), ("proj", inner // self.tp)):
            if inputs % self.group_size:
                raise UsageError(
                    f"--group-size {self.group_size} with --tp {self.tp}: {inputs} inputs of {module} per rank, and "
                    "whole groups are needed; take a smaller group or another --tp"
                )

    def _check_multiples(self) -> None:
        shape, tp = self.shape, self.tp
        kv = max(shape.num_kv_heads // tp, 1) * shape.head_size
        sizes = {
            "hidden size": shape.hidden_size,
            "attention input": shape.hidden_size // tp,
            "query, key and value rows": shape.hidden_size // tp + 2 * kv,
            "intermediate size": shape.intermediate_size // tp,
        }
        for what, size in sizes.items():
            if size % _WEIGHT_ONLY_MULTIPLE:
                raise UsageError(
                    f"--precision {self.precision.value} with --tp {tp}: {what} per rank is {size}, no multiple of "
                    f"{_WEIGHT_ONLY_MULTIPLE}; take another --tp, or float16 or bfloat16"
                )

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        shape = self.shape
        return {
            "architecture": ARCHITECTURE,
            "gpt_variant": "nemotron",
            "dtype": self.dtype,
            "logits_dtype": "float32",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "max_position_embeddings": shape.max_positions,
            "hidden_act": "squared-relu",
            "norm_epsilon": shape.norm_epsilon,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_pct": shape.rotary_share,
            "rotary_base": shape.rotary_base,
            "rotary_scaling": None,
            "bias": False,
            "q_scaling": 1,
            "embedding_scale": None,
            "apply_query_key_layer_scaling": False,
            "inner_layernorm": False,
            "norm_before_bmm1": False,
            "qk_layernorm": False,
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": self.embedding_sharding_dim,
            "mapping": {"world_size": self.world_size, "tp_size": self.tp, "pp_size": self.pp},
            "quantization": self._quantization(),
        }

    def _quantization(self) -> dict[str, Any]:
        algorithms = {
            "quant_algo": self.precision.quant_algo(self.group_size),
            "kv_cache_quant_algo": self.kv_cache,
        }
        if self.group_size is None:
            return algorithms
        pre_quant_scale = self.precision is Precision.INT4_AWQ
        return algorithms | {"group_size": self.group_size, "has_zero_point": False,
                             "pre_quant_scale": pre_quant_scale, "exclude_modules": ["lm_head"]}  # fmt: skip
