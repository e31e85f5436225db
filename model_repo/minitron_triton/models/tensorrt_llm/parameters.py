"""A model's parameters, read as the C++ backend reads them: what is missing or makes no sense takes the default."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minitron.text import end_ids

log = logging.getLogger(__name__)

T = TypeVar("T")
_BOOLS = {
    "True": True,
    "true": True,
    "TRUE": True,
    "1": True,
    "False": False,
    "false": False,
    "FALSE": False,
    "0": False,
}
_SPECULATIONS = {"none": False, "prompt_lookup": True}


@dataclass(frozen=True)
class Parameters:
    """What the engine's model uses of its config.pbtxt; the other keys mean nothing on a CPU."""

    engine_folder: Path
    end_ids: tuple[int, ...]
    decoupled: bool
    max_queue: int
    kv_cache_tokens: int | None
    reuse_kv_cache: bool
    prompt_lookup: bool
    exclude_input_in_output: bool
    cancellation_check_s: float
    stats_check_s: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Parameters:
        """Read the parsed model config; raises ValueError where it names no engine folder or an unusable tokenizer."""
        values = {key: entry["string_value"] for key, entry in (config.get("parameters") or {}).items()}
        folder = Path(values.get("gpt_model_path", ""))
        if not folder.is_absolute() or not folder.is_dir():
            raise ValueError(f"parameter gpt_model_path is {str(folder)!r}, and an absolute path of a folder is needed")
        return cls(
            engine_folder=folder,
            end_ids=end_ids.of_model(Path(values["tokenizer_dir"])) if values.get("tokenizer_dir") else (),
            decoupled=bool((config.get("model_transaction_policy") or {}).get("decoupled", False)),
            max_queue=_read(values, "max_queue_size", int, 0),
            kv_cache_tokens=_read(values, "max_tokens_in_paged_kv_cache", int, None),
            reuse_kv_cache=_read(values, "enable_kv_cache_reuse", _BOOLS.__getitem__, True),
            prompt_lookup=_read(values, "speculation", _SPECULATIONS.__getitem__, False),
            exclude_input_in_output=_read(values, "exclude_input_in_output", _BOOLS.__getitem__, False),
            cancellation_check_s=_read(values, "cancellation_check_period_ms", int, 100) / 1000,
            stats_check_s=_read(values, "stats_check_period_ms", int, 100) / 1000,
        )


def _read(values: Mapping[str, str], key: str, convert: Callable[[str], T], default: T) -> T:
    if key not in values:
        return default
    try:
        return convert(values[key])
    except (ValueError, KeyError):
        log.warning("parameter %s is %r, which cannot be read; %r is used", key, values[key], default)
        return default
