"""Whether this machine's memory holds a CPU engine, asked before anything is started."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minitron.console import human_bytes
from minitron.errors import NotEnoughMemory, RepositoryError
from minitron.machine import cpu_execution, memory


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
        kv_bytes = int(length * per_token * cpu_execution.kv_element_bytes_of(config))
        weight_bytes = (engine / "openvino" / "openvino_model.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryError(f"{where} is no CPU engine's config ({error!r}); render the repository again") from error
    return Need(weight_bytes, kv_bytes, length)


def check(engine: Path) -> None:
    """Raise NotEnoughMemory, with the numbers, where the engine cannot fit."""
    needed, free = need(engine), memory.available_bytes()
    if needed.weight_bytes + needed.kv_bytes > free:
        raise NotEnoughMemory(
            f"the engine needs {human_bytes(needed.weight_bytes)} for its weights and {human_bytes(needed.kv_bytes)} "
            f"for the KV cache of one sequence of {needed.max_seq_len} tokens, and {human_bytes(free)} are free; "
            "convert with an int8 or int4 precision, or build with a smaller --max-seq-len"
        )
