"""Whether what trtllm-build left is the engine that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.errors import ToolError
from minitron.machine import compat
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.engines.tensorrt.flags import Value, flags

#: What of the checkpoint's config must stand in the engine's, and the blocks that TensorRT-LLM fills up with defaults.
_KEYS = ("architecture", "dtype", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
_BLOCKS = ("mapping", "quantization")


def check(folder: Path, checkpoint: Checkpoint, chosen: Mapping[str, Value], version: str) -> None:
    """Every rank's engine and a config.json that says what was asked; raises ToolError naming the first that does not.

    ``chosen`` are the flags by name, ``version`` the TensorRT-LLM that was to build it.
    """
    for rank in range(checkpoint.tp * checkpoint.pp):
        engine = folder / f"rank{rank}.engine"
        if not engine.is_file() or not engine.stat().st_size:
            raise ToolError(f"trtllm-build ended well and wrote no {engine.name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, build = dict(config["pretrained_config"]), dict(config["build_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolError(f"trtllm-build ended well without a config.json to read ({error!r})") from error
    if not compat.same_version(str(config.get("version")), version):
        _same("version", config.get("version"), version)
    _check_model(model, checkpoint.config, chosen)
    plugins = build.get("plugin_config") or {}
    for name, value in chosen.items():
        flag = flags()[name]
        if flag.type == "text":
            continue  # a path: where things were, not what the engine is
        if flag.plugin:
            _same(f"build_config.plugin_config.{name}", plugins.get(name), flag.in_config(value))
        elif flag.build_config:
            _same(f"build_config.{flag.build_config}", build.get(flag.build_config), flag.in_config(value))


def _check_model(model: Mapping[str, Any], ours: Mapping[str, Any], chosen: Mapping[str, Value]) -> None:
    for key in _KEYS:
        _same(f"pretrained_config.{key}", model.get(key), ours.get(key))
    for block in _BLOCKS:
        for key, wanted in ours.get(block, {}).items():
            _same(f"pretrained_config.{block}.{key}", (model.get(block) or {}).get(key), wanted)
    if "logits_dtype" in chosen:
        _same("pretrained_config.logits_dtype", model.get("logits_dtype"), chosen["logits_dtype"])


def _same(where: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ToolError(f"the engine's config.json says {where} {found!r}, and {wanted!r} was asked")
