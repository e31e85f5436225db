"""What a Nemotron model looks like, read from its config.json as transformers' NemotronConfig reads it.

transformers 4 keeps ``rope_theta`` and ``partial_rotary_factor`` at the top level and the type in ``torch_dtype``;
transformers 5 moves the first two into ``rope_parameters`` and renames the last to ``dtype``. A key that is left out
has NemotronConfig's own default. A key that says what TensorRT-LLM's Nemotron cannot do is refused by its name, and so
are two that contradict each other; a key that changes nothing is passed over. Nothing here knows the numbers of a
particular model.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import ModelError

log = logging.getLogger(__name__)

ARCHITECTURE = "NemotronForCausalLM"
MODEL_TYPE = "nemotron"
#: NemotronConfig's own, for keys that are left out (transformers 4.57 and 5, configuration_nemotron.py).
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32,
    "num_attention_heads": 48, "max_position_embeddings": 4096, "norm_eps": 1e-5, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
#: Keys that change what a model computes, with what TensorRT-LLM's Nemotron has built in; the first stands for absence.
_BUILT_IN: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,), "bias": (False, None),
    "is_encoder_decoder": (False,), "sliding_window": (None,), "attention_chunk_size": (None,),
    "per_layer_config": (None, {}), "pruned_heads": (None, {}), "quantization_config": (None, {}),
    "text_config": (None,), "configuration_files": (None, []),
}  # fmt: skip
#: Other spellings, read by vLLM (transformers_utils/configs/nemotron.py, config.py) and passed over by transformers.
_ALSO = {
    "partial_rotary_factor": ("rope_percent", "rope_percentage", "rotary_pct", "rotary_emb_fraction"),
    "rope_theta": ("rotary_emb_base",),
    "head_dim": ("kv_channels",),
}
#: Names of torch's types for weights.
_DTYPES = {"float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32", "float": "float32"}
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
    _check_built_in(raw, where)
    rope = _rope(raw, where)
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
        rotary_share=_rotary("partial_rotary_factor", raw, rope, where),
        rotary_base=_rotary("rope_theta", raw, rope, where),
        tied_embeddings=_flag(raw, "tie_word_embeddings", where),
        dtype=_dtype(raw, where),
    )
    _check_consistent(shape, raw, where)
    _say_what_is_left_out(raw, rope, where)
    return shape


def _check_family(raw: Mapping[str, Any], where: str) -> None:
    """``model_type`` is what transformers goes by, ``architectures`` what vLLM and TensorRT-LLM do."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    architectures = [architectures] if isinstance(architectures, str) else architectures
    found = f"architectures {architectures}" if architectures else f"model_type {model_type!r}"
    if architectures not in ((None, [], [ARCHITECTURE]) if model_type == MODEL_TYPE else ([ARCHITECTURE],)):
        raise ModelError(f"{where}: {found} is not {ARCHITECTURE}; only Nemotron models (Minitron) can be converted")
    if model_type not in (None, MODEL_TYPE):
        raise ModelError(f"{where}: model_type {model_type!r} contradicts architectures {architectures}; correct one")


def _check_built_in(raw: Mapping[str, Any], where: str) -> None:
    for key, values in _BUILT_IN.items():
        value = raw.get(key, values[0])
        if not any(value == one and type(value) is type(one) for one in values):
            raise ModelError(f"{where}: {key} is {value!r}; TensorRT-LLM's Nemotron has {values[0]!r} built in")
    layers = raw.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
        raise ModelError(f"{where}: layer_types is {layers!r}; TensorRT-LLM's Nemotron has 'full_attention' built in")


def _rope(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What ``rope_scaling`` says, else ``rope_parameters``: the order of transformers 5."""
    found: list[Mapping[str, Any]] = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            raise ModelError(f"{where}: {key} is {rope!r}, and one plain object for all layers is needed")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelError(f"{where}: {key} of type {kind!r} is not looked at by TensorRT-LLM's Nemotron; remove it")
        found.append(rope)
    return found[0] if found else {}


def _rotary(key: str, raw: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> float:
    """The number that ``key`` stands for, under whichever of its names, at whichever place; all must agree."""
    said = [(f"{key} (rope)", _number(rope, key, where))] if key in rope else []
    said += [(key, _number(raw, key, where))] if key in raw else []
    others = [(name, _number(raw, name, where)) for name in _ALSO[key] if raw.get(name) is not None]
    if not said and not others:
        return float(DEFAULTS[key])
    if len({value for _, value in said + others}) > 1:
        listed = " and ".join(f"{name} {value:g}" for name, value in said + others)
        raise ModelError(f"{where}: {listed} contradict each other; keep {key} alone")
    name, value = (said + others)[0]
    if not said and value != DEFAULTS[key]:
        log.warning("%s: %s %g is obeyed, as by vLLM and TensorRT-LLM; transformers reads only %s, and would take its "
                    "default of %g", where, name, value, key, DEFAULTS[key])  # fmt: skip
    if key == "partial_rotary_factor" and value > 1:
        raise ModelError(f"{where}: {name} is {value}, and a share of at most 1 is needed")
    return value


def _size(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key, DEFAULTS.get(key))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
        raise ModelError(f"{where}: {key} is {value!r}, and a whole number above 0 is needed")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = raw.get(key, DEFAULTS.get(key))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{where}: {key} is {value!r}, and a number above 0 is needed")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, DEFAULTS[key])
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key} is {value!r}, and true or false is needed")
    return value


def _dtype(raw: Mapping[str, Any], where: str) -> str | None:
    key = "torch_dtype" if raw.get("dtype") is None else "dtype"
    value = raw.get(key)
    if value is None:
        return None
    name = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if name is None:
        raise ModelError(f"{where}: {key} {value!r} is not float16, bfloat16 or float32")
    return name


def _check_consistent(shape: ModelShape, raw: Mapping[str, Any], where: str) -> None:
    for key in ("head_dim", *_ALSO["head_dim"]):
        size = shape.head_size if raw.get(key) is None else _size(raw, key, where)
        if size != shape.head_size or shape.num_heads * size != shape.hidden_size:
            raise ModelError(
                f"{where}: {shape.num_heads} heads of {size} do not make a hidden size of {shape.hidden_size}; "
                f"TensorRT-LLM's Nemotron needs hidden_size = num_attention_heads x {key}"
            )
    if shape.num_heads % shape.num_kv_heads:
        raise ModelError(
            f"{where}: {shape.num_heads} heads cannot share {shape.num_kv_heads} key/value heads evenly "
            "(num_attention_heads, num_key_value_heads)"
        )
    if shape.rotary_size < 2 or shape.rotary_size % 2:
        raise ModelError(
            f"{where}: {shape.rotary_share} of a head of {shape.head_size} is {shape.rotary_size} rotated elements "
            "(partial_rotary_factor), and an even number of at least 2 is needed"
        )


def _say_what_is_left_out(raw: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> None:
    """One line, since a config.json that was cut is not told from one whose writer left defaults out."""
    names = {key: (key, *_ALSO.get(key, ())) for key in DEFAULTS if key != "tie_word_embeddings"}
    left_out = [key for key, spelled in names.items() if key not in rope and not any(raw.get(k) for k in spelled)]
    if left_out:
        taken = ", ".join(f"{key} {DEFAULTS[key]:g}" for key in left_out)
        log.warning("%s leaves out %s: NemotronConfig's own default is taken", where, taken)
