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


def properties(config: Mapping[str, Any]) -> dict[str, str]:
    """Plugin settings of an engine, by its config.json; raises KeyError, TypeError where it is no CPU engine's.

    A checkpoint with an INT8 KV cache has the plugin's own 8 bits: a scale and a zero point for each token and head,
    found as it runs, where TensorRT-LLM has one scale a layer, found by calibration. Exact sets arithmetic, keys/values
    and activations to float32. Fast is the plugin's bfloat16 and 8 bits, with activations quantised by groups of 128;
    for int8 weights that costs a single stream more than it gains.
    """
    quantization = config["pretrained_config"].get("quantization") or {}
    if config["cpu"]["execution"] == "exact":
        eight_bits = quantization.get("kv_cache_quant_algo") == "INT8"
        return {"EXECUTION_MODE_HINT": "ACCURACY"} | ({"KV_CACHE_PRECISION": "u8"} if eight_bits else {})
    int8 = quantization.get("quant_algo") == "W8A16"
    single = config["build_config"]["max_batch_size"] == 1
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0" if int8 and single else "128"}
