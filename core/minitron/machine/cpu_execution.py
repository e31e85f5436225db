"""How a CPU engine executes: settings of OpenVINO's CPU plugin, and what its KV cache takes.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Bytes of an element of the KV cache: float32 in exact mode; in fast mode 8 bits with scales and zero points, measured
#: as 76 kB per token of the 4B shape, which has 65,536 elements a token (OpenVINO 2026.4.1).
KV_ELEMENT_BYTES = {"exact": 4.0, "fast": 76_000 / 65_536}


def properties(config: Mapping[str, Any]) -> dict[str, str]:
    """Plugin settings of an engine, by its config.json; raises KeyError, TypeError where it is no CPU engine's.

    Exact sets arithmetic, keys/values and activations to float32. Fast is the plugin's bfloat16 and 8 bits, with
    activations quantised by groups of 128; for int8 weights that costs a single stream more than it gains.
    """
    if config["cpu"]["execution"] == "exact":
        return {"EXECUTION_MODE_HINT": "ACCURACY"}
    int8 = (config["pretrained_config"].get("quantization") or {}).get("quant_algo") == "W8A16"
    single = config["build_config"]["max_batch_size"] == 1
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0" if int8 and single else "128"}
