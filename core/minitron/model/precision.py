"""What a weight can be stored as, and what TensorRT-LLM calls it.

``Precision`` is what a user asks for; ``dtype`` is what activations, norms and unquantised weights are in. For the
16-bit precisions both are the same; the weight-only ones combine with either dtype.
"""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    """How the four linear weights of every layer are stored in a checkpoint."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8_WEIGHT_ONLY = "int8_weight_only"
    INT4_WEIGHT_ONLY = "int4_weight_only"

    @property
    def weight_bits(self) -> int:
        """Bits per stored weight of a linear layer: 16, 8 or 4."""
        return {"int8_weight_only": 8, "int4_weight_only": 4}.get(self.value, 16)

    @property
    def is_weight_only(self) -> bool:
        """Whether codes and per-channel scales take the place of the linear weights."""
        return self.weight_bits < 16

    @property
    def quant_algo(self) -> str | None:
        """``quantization.quant_algo`` in a checkpoint's config.json (TensorRT-LLM QuantAlgo)."""
        return {8: "W8A16", 4: "W4A16"}.get(self.weight_bits)


#: Activation types that the toolkit writes; the names are those of TensorRT-LLM's config.json.
DTYPES = ("float16", "bfloat16")
