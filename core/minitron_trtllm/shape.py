"""What a Nemotron model looks like, read from its config.json in every spelling that is about.

transformers 4 keeps ``rope_theta`` and ``partial_rotary_factor`` at the top level and the type in ``torch_dtype``;
transformers 5 moves the first two into ``rope_parameters`` and renames the last to ``dtype``; older Nemotron configs
say ``rope_percent``. Nothing here knows the numbers of a particular model.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_trtllm.errors import ModelError

log = logging.getLogger(__name__)

ARCHITECTURE = "NemotronForCausalLM"
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class ModelShape:
    """Sizes and constants of a NemotronForCausalLM; all lengths in elements.

    ``rotary_share`` is the part of each head that is rotated, ``dtype`` the type the weights are said to be stored in
    (None where the config is silent).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    norm_epsilon: float
    rotary_share: float
    rotary_base: float
    tied_embeddings: bool
    dtype: str | None

    @property
    def head_size(self) -> int:
        """Elements per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Rotated elements per head (the first ones)."""
        return int(self.head_size * self.rotary_share)

    @property
    def parameters(self) -> int:
        """Number of weights, the tied head counted once."""
        kv = self.num_kv_heads * self.head_size
        layer = self.hidden_size * (2 * self.hidden_size + 2 * kv + 2 * self.intermediate_size + 4)
        heads = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * self.hidden_size + 2 * self.hidden_size


def read(config: Path) -> ModelShape:
    """Read the shape from a Hugging Face config.json; raises ModelError."""
    return from_config(load(config), str(config))


def load(config: Path) -> dict[str, Any]:
    """Parse a config.json into a dictionary; raises ModelError."""
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{config} is not there: a model folder has a config.json and *.safetensors files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{config} holds no JSON object, so it is no model's config")
    return raw


def from_config(raw: Mapping[str, Any], where: str) -> ModelShape:
    """Read the shape from the content of a config.json that came from ``where``; raises ModelError."""
    _check_family(raw, where)
    rope = raw.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    heads = _size(raw, "num_attention_heads", where)
    shape = ModelShape(
        vocab_size=_size(raw, "vocab_size", where),
        hidden_size=_size(raw, "hidden_size", where),
        intermediate_size=_size(raw, "intermediate_size", where),
        num_layers=_size(raw, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=heads if raw.get("num_key_value_heads") is None else _size(raw, "num_key_value_heads", where),
        max_positions=_size(raw, "max_position_embeddings", where),
        norm_epsilon=_number(raw, "norm_eps", where),
        rotary_share=_rotary_share(raw, rope, where),
        rotary_base=_number(rope if "rope_theta" in rope else raw, "rope_theta", where),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=_dtype(raw, where),
    )
    _check_consistent(shape, raw, where)
    return shape


def _check_family(raw: Mapping[str, Any], where: str) -> None:
    architectures = raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        named = architectures if architectures else f"model_type {raw.get('model_type')!r}"
        raise ModelError(f"{where}: {named} is not {ARCHITECTURE}; only Nemotron models (Minitron) can be converted")
    for key, wanted in (("hidden_act", "relu2"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, wanted) != wanted:
            raise ModelError(f"{where}: {key} is {raw[key]!r}; TensorRT-LLM's Nemotron has {wanted!r} built in")
    scaling = raw.get("rope_scaling")
    if scaling not in (None, {}) and not _plain_rope(scaling):
        raise ModelError(f"{where}: rope_scaling {scaling!r} is not looked at by TensorRT-LLM's Nemotron; remove it")
    if isinstance(raw.get("rope_parameters"), Mapping) and not _plain_rope(raw["rope_parameters"]):
        raise ModelError(
            f"{where}: rope_parameters of type {raw['rope_parameters'].get('rope_type')!r} are not supported"
        )


def _plain_rope(rope: object) -> bool:
    return isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) in (None, "default")


def _size(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
        raise ModelError(f"{where}: {key} is {value!r}, and a whole number above 0 is needed")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{where}: {key} is {value!r}, and a number above 0 is needed")
    return float(value)


def _rotary_share(raw: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> float:
    for holder, key in ((rope, "partial_rotary_factor"), (raw, "partial_rotary_factor"), (raw, "rope_percent")):
        if holder.get(key) is not None:
            share = _number(holder, key, where)
            if share > 1:
                raise ModelError(f"{where}: {key} is {share}, and a share of at most 1 is needed")
            return share
    log.warning("%s says neither partial_rotary_factor nor rope_percent: whole heads are rotated, as the official "
                "converter does", where)  # fmt: skip
    return 1.0


def _dtype(raw: Mapping[str, Any], where: str) -> str | None:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise ModelError(f"{where}: dtype {value!r} is not float16, bfloat16 or float32")
    return name


def _check_consistent(shape: ModelShape, raw: Mapping[str, Any], where: str) -> None:
    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = shape.hidden_size // shape.num_heads
    if head_dim != shape.head_size or shape.num_heads * shape.head_size != shape.hidden_size:
        raise ModelError(
            f"{where}: {shape.num_heads} heads of {head_dim} do not make a hidden size of {shape.hidden_size}; "
            "TensorRT-LLM's Nemotron needs hidden_size = num_attention_heads x head_dim"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise ModelError(f"{where}: {shape.num_heads} heads cannot share {shape.num_kv_heads} key/value heads evenly")
    if shape.rotary_size < 2 or shape.rotary_size % 2:
        raise ModelError(
            f"{where}: {shape.rotary_share} of a head of {shape.head_size} is {shape.rotary_size} rotated elements, "
            "and an even number of at least 2 is needed"
        )
