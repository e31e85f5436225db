"""How a CPU engine executes: settings of OpenVINO's CPU plugin, what its KV cache takes and what a row costs.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

#: Bytes of an element of the KV cache: float32 in exact mode; in fast mode 8 bits with scales and zero points, measured
#: as 76 kB per token of the 4B shape, which has 65,536 elements a token (OpenVINO 2026.4.1).
KV_ELEMENT_BYTES = {"exact": 4.0, "fast": 76_000 / 65_536}


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


CPUINFO = Path("/proc/cpuinfo")

#: What one more row costs in a step, by what the processor can do. A step reads all weights once, whatever it computes,
#: and calculates for each row, a token of a stream: it takes 1 + cost x rows, in units of what does not depend on rows.
#: A table, and no measurement at the start, since a server may start while its machine is busy. Four rows to one row,
#: on two cores each: AVX-512 1.3 (int8) to 1.4 (int4) times as long, AVX2 2.2 to 2.9 times; fast on AVX-512 with VNNI
#: 138 to 130 ms (int4, 4B shape, OpenVINO 2026.4.1).
ROW_COSTS: Mapping[str, Mapping[str, float]] = {
    "exact": {"avx512f": 0.14, "avx2": 1.0},
    "fast": {"avx512_vnni": 0.02, "avx512f": 0.14, "avx2": 1.0},
}


def row_cost(execution: str, flags: Container[str]) -> float:
    """The cost of a row for a processor with these flags; that of AVX2 where nothing better is known."""
    costs = ROW_COSTS[execution]
    return next((cost for flag, cost in costs.items() if flag in flags), costs["avx2"])


def processor_flags() -> frozenset[str]:
    """What the kernel says that the processor can do (proc(5), flags); nothing where it does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
