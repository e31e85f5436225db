"""An engine's own config.json held against the plan in its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.acceptance import Line, judge
from minitron.artifacts import manifest
from minitron.errors import EngineError
from minitron.machine import compat


def judge_engine(folder: Path) -> list[Line]:
    """``engine.config``: limits as planned, precision as the checkpoint's; raises InputError, EngineError."""
    details = manifest.read(folder, "engine").details
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        build, model = dict(config["build_config"]), dict(config["pretrained_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder / 'config.json'} cannot be read ({error!r}); build the engine again") from error
    problems = [*_limits(build, details["limits"]), *_model(model, details), *_version(config, details)]
    shown = ", ".join(f"{name} {value}" for name, value in details["limits"].items())
    return [judge("engine.config", problems, f"{config['version']}: {shown}")]


def _limits(build: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {build.get(name)}, and {value} was planned"
        for name, value in planned.items()
        if build.get(name) != value
    ]


def _model(model: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    wanted = {"dtype": details["dtype"], "vocab_size": details["vocab_size"]}
    return [f"{key} is {model.get(key)!r}, not {value!r}" for key, value in wanted.items() if model.get(key) != value]


def _version(config: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    wanted = details.get("tensorrt_llm")
    if wanted is None or compat.same_version(str(config.get("version")), wanted):
        return []
    return [f"version is {config.get('version')}, and {wanted} was to build it"]
