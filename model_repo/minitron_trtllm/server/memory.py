"""Whether this machine's memory holds a CPU engine, asked before anything is started."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minitron_trtllm.errors import NotEnoughMemory, RepositoryError
from minitron_trtllm.output import human_bytes

# Bytes per element of the KV cache: float32 in exact mode; 8-bit codes with scales in fast mode (76 kB per token
# against 262 kB at the 4B shape, measured with OpenVINO 2026.4.1).
_KV_BYTES = {"exact": 4.0, "fast": 4.0 * 76 / 262}


@dataclass(frozen=True)
class Need:
    """What an engine takes at the least: its weights, and a KV cache for one sequence of the full length, in bytes."""

    weight_bytes: int
    kv_bytes: int
    max_seq_len: int


def need(engine: Path) -> Need:
    """Read the engine folder of a CPU engine; raises RepositoryError."""
    where = engine / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        model, length = config["pretrained_config"], int(config["build_config"]["max_seq_len"])
        per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_size"]
        kv_bytes = int(length * per_token * _KV_BYTES[config["cpu"]["execution"]])
        weight_bytes = (engine / "openvino" / "openvino_model.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryError(f"{where} is no CPU engine's config ({error!r}); render the repository again") from error
    return Need(weight_bytes, kv_bytes, length)


def check(engine: Path) -> None:
    """Raise NotEnoughMemory, with the numbers, where the engine cannot fit."""
    needed, free = need(engine), available_bytes()
    if needed.weight_bytes + needed.kv_bytes > free:
        raise NotEnoughMemory(
            f"the engine needs {human_bytes(needed.weight_bytes)} for its weights and {human_bytes(needed.kv_bytes)} "
            f"for the KV cache of one sequence of {needed.max_seq_len} tokens, and {human_bytes(free)} are free; "
            "convert with an int8 or int4 precision, or build with a smaller --max-seq-len"
        )


def available_bytes() -> int:
    """Memory that can be taken without swapping (proc(5), MemAvailable), or what the control group leaves of it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_group_leaves(Path("/sys/fs/cgroup"))])


def _group_leaves(group: Path) -> list[int]:
    """Of this container's control group, version 2 or 1; page cache counts as used there but can be dropped."""
    for limit, usage, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
    ):
        try:
            words = [line.split() for line in (group / statistics).read_text().splitlines()]
            cached = next(int(value) for name, value in words if name == cache)
            return [int((group / limit).read_text()) - int((group / usage).read_text()) + cached]
        except (OSError, ValueError, StopIteration):
            continue  # no limit ("max"), or the other version
    return []
