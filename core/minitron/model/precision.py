"""What a weight can be stored as, and what TensorRT-LLM calls it.

``Precision`` is how the linear weights are stored; ``dtype`` is what activations, norms and unquantised weights are in.
For the 16-bit precisions both are the same; the others combine with either dtype.
"""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    """How the four linear weights of every layer are stored in a checkpoint.

    Names from ``fp8`` on are those of TensorRT-LLM's ``quantize.py`` (``--qformat``): read where others wrote them, not
    written here.
    """

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8_WEIGHT_ONLY = "int8_weight_only"
    INT4_WEIGHT_ONLY = "int4_weight_only"
    INT4_AWQ = "int4_awq"
    FP8 = "fp8"
    INT8_SQ = "int8_sq"
    W4A8_AWQ = "w4a8_awq"

    @property
    def weight_bits(self) -> int:
        """Bits per stored weight of a linear layer: 16, 8 or 4."""
        return {"int8_weight_only": 8, "int4_weight_only": 4, "int4_awq": 4, "fp8": 8, "int8_sq": 8, "w4a8_awq": 4}.get(
            self.value, 16
        )

    @property
    def is_weight_only(self) -> bool:
        """Whether codes and scales take the place of the linear weights, with 16-bit activations."""
        return self in (Precision.INT8_WEIGHT_ONLY, Precision.INT4_WEIGHT_ONLY, Precision.INT4_AWQ)

    @property
    def has_channel_scales(self) -> bool:
        """Whether codes have one scale for each output channel where no group size is said: no text is needed for them,
        and trtllm-build can make them too."""
        return self.is_weight_only and self.default_group_size is None

    @property
    def takes_group_size(self) -> bool:
        """Whether a 4-bit scale may be shared by some inputs of a channel only."""
        return self.is_weight_only and self.weight_bits == 4

    @property
    def shown(self) -> str:
        """In a table of weights, where both 16-bit types are one."""
        return "16-bit" if self.weight_bits == 16 else self.value.removesuffix("_weight_only")

    @property
    def has_eight_bit_activations(self) -> bool:
        """Whether products are of 8-bit activations too, which only GPUs have here."""
        return self in (Precision.FP8, Precision.INT8_SQ, Precision.W4A8_AWQ)

    @property
    def needs_fp8(self) -> bool:
        """Whether the GPU must calculate in FP8: compute capability 8.9 or higher."""
        return self in (Precision.FP8, Precision.W4A8_AWQ)

    @property
    def default_group_size(self) -> int | None:
        """Inputs that share a scale where nothing else is said; None: one scale for each output channel."""
        return GROUP_SIZES[-1] if self in (Precision.INT4_AWQ, Precision.W4A8_AWQ) else None

    def quant_algo(self, group_size: int | None = None) -> str | None:
        """``quantization.quant_algo`` in a checkpoint's config.json (TensorRT-LLM QuantAlgo)."""
        if group_size and self is Precision.INT4_WEIGHT_ONLY:
            return "W4A16_AWQ"
        return {"int8_weight_only": "W8A16", "int4_weight_only": "W4A16", "int4_awq": "W4A16_AWQ", "fp8": "FP8",
                "int8_sq": "W8A8_SQ_PER_CHANNEL", "w4a8_awq": "W4A8_AWQ"}.get(self.value)  # fmt: skip


#: What ``convert`` writes of the weights alone, without a calibration text.
ROUNDED = (Precision.FLOAT16, Precision.BFLOAT16, Precision.INT8_WEIGHT_ONLY, Precision.INT4_WEIGHT_ONLY)
#: All that ``convert`` writes.
WRITTEN = (*ROUNDED, Precision.INT4_AWQ)
#: Inputs of a channel that may share a 4-bit scale: what TensorRT-LLM's kernels have (1.x,
#: ``weightOnlyGroupwiseQuantMatmulPlugin``).
GROUP_SIZES = (64, 128)
#: Activation types that the toolkit writes; the names are those of TensorRT-LLM's config.json.
DTYPES = ("float16", "bfloat16")
#: What stands for the model's own type.
AUTO = "auto"


def resolved(precision: str, dtype: str, stored: str | None) -> tuple[str, str]:
    """``precision`` and ``dtype`` with "auto" resolved, for a model whose config.json says ``stored``.

    The model's own type, and float16 for float32 or where nothing is said: the rule of TensorRT-LLM's converter
    (``infer_dtype`` of models/convert_utils.py, 1.x).
    """
    own = stored if stored in DTYPES else "float16"
    if dtype == AUTO:
        dtype = precision if precision in DTYPES else own
    return (dtype if precision == AUTO else precision), dtype
