"""What a repository has to know about an engine, read from the engine folder's own config.json and its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import EngineError
from minitron_triton.repository import parameters

_LOGITS = {"float32": "FP32", "float16": "FP16"}


@dataclass(frozen=True)
class EngineFacts:
    """Limits and sizes of an engine, all lengths in tokens; ``logits_dtype`` in Triton's spelling.

    ``gather_context_logits``: it can return the logits of a prompt. ``kv_cache_fraction`` is the share of free GPU
    memory that the engine was planned for (None: not planned).
    """

    version: str
    is_cpu: bool
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    max_beam_width: int
    vocab_size: int
    world_size: int
    logits_dtype: str
    paged_context: bool
    gather_context_logits: bool
    gather_generation_logits: bool
    kv_cache_fraction: float | None

    @property
    def loses_context_logits(self) -> bool:
        """Whether the logits of a prompt are wrong where its beginning is taken from the KV cache.

        TensorRT-LLM computes none for such tokens and returns what is in the memory in their place, with a line in its
        log ("not all context logits could be produced", handleContextLogits.cpp). The CPU engine computes them apart.
        """
        return self.gather_context_logits and not self.is_cpu

    def context_logits(self, enable_kv_cache_reuse: str) -> str:
        """The type of the logits that are returned of a prompt, "none" where none or wrong ones are."""
        wrong = self.loses_context_logits and parameters.is_true(enable_kv_cache_reuse)
        return self.logits_dtype if self.gather_context_logits and not wrong else "none"


def read(folder: Path, details: Mapping[str, Any]) -> EngineFacts:
    """Read ``folder``/config.json (keys version, pretrained_config, build_config) and look for the engine's files.

    ``details`` are those of the engine's manifest.

    Raises EngineError.
    """
    where = folder / "config.json"
    try:
        raw = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{folder} has no config.json, so it is no engine; 'minitron build' makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{where} cannot be read ({error}); build the engine again") from error
    try:
        facts = _facts(raw, details)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EngineError(f"{where} is no engine's config ({error!r}); build the engine again") from error
    _check_files(folder, facts)
    return facts


def _facts(raw: Mapping[str, Any], details: Mapping[str, Any]) -> EngineFacts:
    build, model = raw["build_config"], raw["pretrained_config"]
    plugins = build.get("plugin_config") or {}
    return EngineFacts(
        version=str(raw["version"]),
        is_cpu="cpu" in raw,
        max_batch_size=_count(build, "max_batch_size"),
        max_input_len=_count(build, "max_input_len"),
        max_seq_len=_count(build, "max_seq_len"),
        max_num_tokens=_count(build, "max_num_tokens"),
        max_beam_width=_count(build, "max_beam_width"),
        vocab_size=_count(model, "vocab_size"),
        world_size=_count(model.get("mapping") or {"world_size": 1}, "world_size"),
        logits_dtype="FP32" if "cpu" in raw else _LOGITS[model.get("logits_dtype", "float32")],
        gather_context_logits="cpu" in raw or bool(build.get("gather_context_logits", False)),
        gather_generation_logits=bool(build.get("gather_generation_logits", False)),
        paged_context=bool(plugins.get("use_paged_context_fmha", False)),
        kv_cache_fraction=details.get("kv_cache_free_gpu_mem_fraction"),
    )


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}")
    return value


def _check_files(folder: Path, facts: EngineFacts) -> None:
    wanted = ["openvino/openvino_model.xml", "openvino/openvino_model.bin"]
    if not facts.is_cpu:
        wanted = [f"rank{rank}.engine" for rank in range(facts.world_size)]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise EngineError(f"{folder} lacks {', '.join(missing)}; build the engine again")
