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


def processor_flags(cpuinfo: Path | None = None) -> frozenset[str]:
    """What the kernel says that the processor can do (proc(5), flags); nothing where it does not say."""
    try:
        lines = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
