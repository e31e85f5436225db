"""How a CPU engine executes: settings of OpenVINO's CPU plugin, and what its KV cache takes.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Bytes of an element of the KV cache: float32 in exact mode; in fast mode 8 bits with scales and zero points, measured
#: as 76 kB per token of the 4B shape, which has 65,536 elements a token (OpenVINO 2026.4.1).
KV_ELEMENT_BYTES = {"exact": 4.0, "fast": 76_000 / 65_536}


def head_of(execution: str, lm_head: str) -> str:
    """What an engine's output head is where the recipe says ``lm_head``: "as_is", "int8" or "screened"."""
    automatic = "screened" if execution == "fast" else "as_is"
    return automatic if lm_head == "auto" else lm_head


def kv_element_bytes(execution: str, kv_cache: str) -> float:
    """Bytes of an element of the KV cache, for what a checkpoint says of it ("auto", "int8" or "fp8")."""
    return KV_ELEMENT_BYTES["fast" if kv_cache == "int8" else execution]


def kv_element_bytes_of(config: Mapping[str, Any]) -> float:
    """The same of an engine, by its config.json; raises KeyError, TypeError where it is no CPU engine's."""
    kept = (config["pretrained_config"].get("quantization") or {}).get("kv_cache_quant_algo")
    return kv_element_bytes(config["cpu"]["execution"], str(kept or "auto").lower())


def exact_properties(kv_cache: str) -> dict[str, str]:
    """Plugin settings that make arithmetic, keys/values and activations float32.

    A checkpoint with an INT8 KV cache has the plugin's own 8 bits: a scale and a zero point for each token and head,
    found as it runs, where TensorRT-LLM has one scale a layer, found by calibration.
    """
    return {"EXECUTION_MODE_HINT": "ACCURACY"} | ({"KV_CACHE_PRECISION": "u8"} if kv_cache == "int8" else {})


def properties(config: Mapping[str, Any]) -> dict[str, str]:
    """Plugin settings of an engine, by its config.json, which the build wrote them into.

    Raises KeyError, TypeError where it is no CPU engine's, or one of before 0.3.
    """
    return dict(config["cpu"]["properties"])
