"""Which files hold a model's weights: the rule of transformers, for folders and for Hugging Face ids.

What config.json's ``transformers_weights`` names, else model.safetensors, else the files of the index (transformers 5,
``modeling_utils.py``, ``_get_resolved_checkpoint_files``). Where transformers would read nothing, every *.safetensors
file is taken: more or less than exactly one model is refused by whoever reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import ModelError
from minitron.model import shape as shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_EXPLICIT = "transformers_weights"
_WEIGHTS = re.compile(r"[^/]+\.safetensors")
_ANY_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?")
_OLD = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class WeightFiles:
    """The ``names`` of the files to read, the ``index`` that lists them (if one does), and those ``passed_over``."""

    names: tuple[str, ...]
    index: str | None
    passed_over: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is worth saying where a folder holds more than one set."""
        if not self.passed_over:
            return ()
        return (
            f"{self.index or ', '.join(self.names)} is read, as by transformers; not {', '.join(self.passed_over)}",
        )


def refuse_adapter(names: Collection[str], where: str) -> None:
    """Refuse a folder whose config.json, if it has one, is not what transformers would go by; raises ModelError."""
    if ADAPTER in names:
        raise ModelError(f"{where} is a LoRA adapter ({ADAPTER}), no whole model; merge it into its base model first")


def of_folder(folder: Path) -> WeightFiles:
    """Choose among the files of a model folder; raises ModelError."""
    names = [item.name for item in folder.iterdir() if item.is_file()]
    refuse_adapter(names, str(folder))
    return choose(names, shapes.load(folder / "config.json"), folder.joinpath, str(folder))


def choose(names: Collection[str], config: Mapping[str, Any], get: Callable[[str], Path], where: str) -> WeightFiles:
    """Choose among the files ``names`` of the model at ``where``; ``get`` gives an index's path. Raises ModelError."""
    entry = _entry(names, config, where)
    index = entry if entry and entry.endswith(".index.json") else None
    if index:
        read = tuple(sorted(set(weight_map(get(index)).values())))
    else:
        read = (entry,) if entry else tuple(sorted(name for name in names if _WEIGHTS.fullmatch(name)))
    if not read:
        old = next((f", only {name}: save it again with safe_serialization=True" for name in sorted(names)
                    if name.endswith(_OLD)), "")  # fmt: skip
        raise ModelError(f"{where} has no *.safetensors file{old}")
    others = (name for name in names if _ANY_WEIGHTS.fullmatch(name) and name not in (*read, index))
    return WeightFiles(read, index, tuple(sorted(others)))


def _entry(names: Collection[str], config: Mapping[str, Any], where: str) -> str | None:
    explicit = config.get(_EXPLICIT)
    if explicit is None:
        return next((name for name in (SINGLE, INDEX) if name in names), None)
    if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(f"{where}: config.json's {_EXPLICIT} is {explicit!r}, and a safetensors file is needed")
    if explicit not in names:
        raise ModelError(f"{where} has no {explicit}, which config.json's {_EXPLICIT} names; get it, or remove the key")
    return explicit


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, as an index file says; raises ModelError."""
    raw: Any = shapes.load(index).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise ModelError(f"{index} has no weight_map; get the file again, or remove it")
    for name in raw.values():
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise ModelError(f"{index}: weight_map names {name!r}, and only *.safetensors files beside it can be read")
    return raw
