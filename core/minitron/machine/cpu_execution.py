"""How a CPU engine executes: settings of OpenVINO's CPU plugin, what its KV cache takes and how long steps are.

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
#: How long a step takes by its rows, which are tokens of streams or drafts: as many times as long as a step of one row,
#: by what the processor can do. What lies between lies on a straight line. A table, and no measurement at the start,
#: since a server may start while its machine is busy. Measured on two cores, least times of interleaved runs, OpenVINO
#: 2026.4.1: AVX-512 with VNNI, the 1b shape of ``models/random_model.py``, int4 and int8, whose ratios are alike; exact
#: has another kernel for five rows and more. AVX2: four rows took 2.2 to 2.9 times one, exact or fast.
STEP_TIMES: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "exact": {
        "avx512f": {1: 1.0, 2: 1.14, 4: 1.19, 5: 2.4, 8: 3.5, 16: 3.8, 24: 4.7, 32: 6.0, 1024: 170.0},
        "avx2": {1: 1.0, 4: 2.5, 1024: 512.5},
    },
    "fast": {
        "avx512_vnni": {1: 1.0, 4: 1.03, 8: 1.25, 16: 1.65, 32: 2.6, 1024: 60.0},
        "avx2": {1: 1.0, 4: 2.5, 1024: 512.5},
    },
}


def step_times(execution: str, flags: Container[str]) -> Mapping[int, float]:
    """The times for a processor with these flags; those of AVX2 where nothing better is known."""
    known = STEP_TIMES[execution]
    return next((times for flag, times in known.items() if flag in flags), known["avx2"])


def processor_flags(cpuinfo: Path | None = None) -> frozenset[str]:
    """What the kernel says that the processor can do (proc(5), flags); nothing where it does not say."""
    try:
        lines = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
