"""Read a TensorRT-LLM checkpoint: ours, the official converter's, or any other of the same form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.errors import CheckpointError, UsageError
from minitron.model.precision import DTYPES, GROUP_SIZES, Precision
from minitron.model.shape import ARCHITECTURE, ModelShape
from minitron_build.checkpoint import groups, layout
from minitron_build.checkpoint.plan import Rule, plan_rank
from minitron_build.checkpoint.spec import Spec
from minitron_build.sources.safetensors import SafetensorsEntry, SafetensorsFile

_MAX_RANKS = 1024
_MAX_SIZE = 1 << 31
#: TensorRT-LLM gives both names the same class (1.x ``models/__init__.py``); ModelOpt and Megatron write the second.
_ARCHITECTURES = (ARCHITECTURE, "GPTForCausalLM")
#: Keys that change the model: what TensorRT-LLM takes where one is left out (1.x ``models/modeling_utils.py``,
#: ``models/gpt/config.py``), and what a Nemotron has, which alone is built here.
_BUILT_IN: dict[str, tuple[object, tuple[object, ...]]] = {
    "hidden_act": ("gelu", ("squared-relu", "relu2")),
    "position_embedding_type": ("learned_absolute", ("rope_gpt_neox",)),
    "bias": (True, (False,)), "q_scaling": (1, (1,)), "embedding_scale": (None, (None, 1)),
    "rotary_scaling": (None, (None,)), "apply_query_key_layer_scaling": (False, (False,)),
    "inner_layernorm": (False, (False,)), "norm_before_bmm1": (False, (False,)), "qk_layernorm": (False, (False,)),
    "rmsnorm": (False, (False,)), "is_pruned": (False, (False,)), "moe_num_experts": (0, (0,)),
}  # fmt: skip
#: The same for keys of the blocks.
_BUILT_IN_QUANTIZATION: dict[str, tuple[object, tuple[object, ...]]] = {
    "kv_cache_quant_algo": (None, (None, "INT8", "FP8")), "has_zero_point": (False, (False,)),
    "clamp_val": (None, (None,)), "use_meta_recipe": (False, (False,)),
}  # fmt: skip
#: What may be left out of a quantisation, since a Nemotron has no such linear module beside lm_head (1.x
#: ``quantization/quantize.py``); lm_head itself must be.
_EXCLUDED = ("lm_head", "router", "vocab_embedding", "position_embedding", "block_embedding", "shared_expert_gate")
_BUILT_IN_MAPPING: dict[str, tuple[object, tuple[object, ...]]] = {
    "cp_size": (1, (1,)), "auto_parallel": (False, (False,)), "enable_attention_dp": (False, (False,)),
}  # fmt: skip
_BUILT_IN_MOE: dict[str, tuple[object, tuple[object, ...]]] = {"num_experts": (0, (0,))}
#: Other keys of ``quantization``; one that is not known makes TensorRT-LLM's loading fail.
_QUANTIZATION = (
    "quant_algo", "group_size", "pre_quant_scale", "exclude_modules", "smoothquant_val", "mamba_ssm_cache_dtype",
)  # fmt: skip
#: Where a list, whatever is in it, turns off a longer one of TensorRT-LLM's own.
_OWN_EXCLUSIONS = ("W8A16", "W4A16")
#: What TensorRT-LLM's loader does without: it computes the tables, and a tied head is the embedding.
_OPTIONAL_RULES = (Rule.POSITIONS, Rule.INVERSE_FREQUENCIES, Rule.POSITIONS_FOR_ATTENTION)
#: What ModelOpt adds to kv_cache_scaling_factor, the larger of the two, which is what TensorRT-LLM makes of them (1.x
#: ``modeling_utils.py``, process_kv_scaling_factor).
_KV_APART = (".attention.k_cache_scaling_factor", ".attention.v_cache_scaling_factor")
_MODELOPT_INT8 = (
    "ModelOpt's INT8_WEIGHT_ONLY exports hold codes as [out, in] with weights_scaling_factor, and TensorRT-LLM does "
    "not load them; convert the model itself with --precision int8_weight_only"
)
HEAD = "lm_head.weight"


class Checkpoint:
    """An open checkpoint folder; a context manager, and safe to read from several threads.

    ``config`` is its config.json and ``spec`` what that says. ``shape``, ``dtype`` ("float16" or "bfloat16", of all
    that is no code), ``precision``, ``tp`` and ``pp`` are taken from there.
    """

    def __init__(self, folder: Path, config: dict[str, Any], ranks: list[SafetensorsFile]) -> None:
        self.folder, self.config, self._ranks = folder, config, ranks
        self.spec = _spec(config, folder / "config.json", self.quantized)
        self.shape, self.dtype, self.precision = self.spec.shape, self.spec.dtype, self.spec.precision
        self.tp, self.pp = self.spec.tp, self.spec.pp

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Open ``folder`` and check that config.json and every rank's tensors fit together; raises CheckpointError."""
        folder = Path(folder)
        config = _load(folder / "config.json")
        ranks: list[SafetensorsFile] = []
        try:
            for rank in range(_world_size(config, folder / "config.json")):
                ranks.append(SafetensorsFile(folder / f"rank{rank}.safetensors", CheckpointError))
            opened = cls(folder, config, ranks)
            for rank, file in enumerate(ranks):
                _check_rank(opened.spec, rank, file)
            return opened
        except BaseException:
            for file in ranks:
                file.close()
            raise

    @property
    def quantized(self) -> bool:
        """Whether linear weights are stored as codes, with scales.

        A weight-only checkpoint where they are not is to be quantised when an engine is built from it.
        """
        return any(entry.dtype in ("I8", "F8_E4M3") for entry in self._ranks[0].entries.values())

    def names(self, rank: int = 0) -> list[str]:
        """Names of a rank's tensors, in file order."""
        return list(self._ranks[rank].entries)

    def entry(self, name: str, rank: int = 0) -> SafetensorsEntry:
        """Type, shape and place of a tensor; raises CheckpointError where there is none of that name."""
        try:
            return self._ranks[rank].entries[name]
        except KeyError:
            raise CheckpointError(f"{self._ranks[rank].path} has no tensor {name}; convert the model again") from None

    def array(self, name: str, rank: int = 0) -> npt.NDArray[Any]:
        """A tensor as stored: bfloat16 as ml_dtypes.bfloat16, codes in the layout that ``layout.unpack`` undoes."""
        self.entry(name, rank)
        return self._ranks[rank].rows(name)

    def rows(self, name: str, start: int, stop: int, rank: int = 0) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` of a tensor as stored, without reading the others."""
        self.entry(name, rank)
        return self._ranks[rank].rows(name, start, stop)

    def codes(self, name: str, start: int = 0, stop: int | None = None, rank: int = 0) -> npt.NDArray[np.int8]:
        """Codes int8 [stop - start, in] of output channels ``start`` to ``stop`` (multiples of 64), layout undone."""
        if self.spec.group_size:
            stored = self.rows(name, start // 2, self.entry(name, rank).shape[0] if stop is None else stop // 2, rank)
            return groups.unpack(stored)
        bits = self.precision.weight_bits
        ins, packed = self.entry(name, rank).shape
        stop = packed * 8 // bits if stop is None else stop
        stored = self._ranks[rank].elements(name, start * ins * bits // 8, stop * ins * bits // 8)
        return layout.unpack(stored.reshape(ins, -1), bits)

    def factors(self, name: str, rank: int = 0) -> npt.NDArray[np.float32] | None:
        """What the inputs of the linear module ``name`` are multiplied with, [in]; None: nothing."""
        factors = f"{name}.prequant_scaling_factor"
        if factors not in self._ranks[rank].entries:
            return None
        return self.array(factors, rank).astype(np.float32)

    def close(self) -> None:
        """Close the files."""
        for rank in self._ranks:
            rank.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = f"'minitron convert MODEL --output {path.parent}' makes a checkpoint"
        raise CheckpointError(f"{path} is not there; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("architecture") not in _ARCHITECTURES:
        raise CheckpointError(f"{path} is not of a TensorRT-LLM checkpoint of a Nemotron model (key 'architecture')")
    return config


def _check_rank(spec: Spec, rank: int, file: SafetensorsFile) -> None:
    """Compare a rank's header with the plan of what it should hold."""
    if spec.shape.num_layers > len(file.entries) * spec.pp:  # also keeps an absurd number from being enumerated
        raise CheckpointError(f"{file.path} has too few tensors for {spec.shape.num_layers} layers; convert again")
    planned = {tensor.name: tensor for tensor in plan_rank(spec, rank)}
    for name, tensor in planned.items():
        found = file.entries.get(name)
        if found is None:
            if tensor.rule in _OPTIONAL_RULES or name == HEAD:
                continue
            _explain(spec, name, file)
            raise CheckpointError(f"{file.path} lacks tensor {name}; convert the model again")
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            _explain(spec, name, file)
            raise CheckpointError(
                f"{file.path}: {name} is {found.dtype} {list(found.shape)}, and config.json asks for "
                f"{tensor.dtype} {list(tensor.shape)}; convert the model again"
            )
    known = set(planned) | {name for name in file.entries if spec.kv_cache and name.endswith(_KV_APART)}
    extra = next((name for name in file.entries if name not in known), None)
    if extra is not None:
        raise CheckpointError(f"{file.path} has tensor {extra}, unknown to a Nemotron; convert the model again")


def _explain(spec: Spec, name: str, file: SafetensorsFile) -> None:
    """Say more of a tensor that is not there or not as it should be, where more is known.

    Two of them are exports of ModelOpt 0.47.0 that TensorRT-LLM does not load either.
    """
    linear, _, kind = name.rpartition(".")
    if kind == "kv_cache_scaling_factor":
        raise CheckpointError(
            f"{file.path} has no {name}, and config.json says quantization.kv_cache_quant_algo {spec.kv_cache}; "
            "convert the model again, with --kv-cache int8"
        )
    if kind == "prequant_scaling_factor":
        raise CheckpointError(
            f"{file.path} has no {name}, and config.json says quantization.pre_quant_scale true; ModelOpt's "
            "INT4_BLOCKWISE exports are so, and TensorRT-LLM does not load them: write false there"
        )
    if spec.precision is Precision.INT8_WEIGHT_ONLY and f"{linear}.weights_scaling_factor" in file.entries:
        raise CheckpointError(f"{file.path}: {_MODELOPT_INT8}")


def _world_size(config: dict[str, Any], where: Path) -> int:
    mapping = config.get("mapping", {})
    sizes = [mapping.get(key, 1) for key in ("world_size", "tp_size", "pp_size")] if isinstance(mapping, dict) else []
    if not all(isinstance(size, int) and 0 < size <= _MAX_RANKS for size in sizes) or not sizes:
        raise CheckpointError(f"{where}: mapping {mapping!r} makes no sense; convert the model again")
    if sizes[0] != sizes[1] * sizes[2]:
        raise CheckpointError(f"{where}: world_size {sizes[0]} is not tp_size {sizes[1]} x pp_size {sizes[2]}")
    return int(sizes[0])


def _spec(config: dict[str, Any], where: Path, quantized: bool) -> Spec:
    dtype, mapping = config.get("dtype"), config.get("mapping", {})
    _check_built_in(config, where)
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {dtype!r}, and one of {', '.join(DTYPES)} is needed")
    precision, group_size = _precision(config, dtype, where)
    if (precision.has_eight_bit_activations and not quantized) or (group_size and not quantized):
        algorithm = precision.quant_algo(group_size)
        raise CheckpointError(f"{where}: quantization.quant_algo is {algorithm}, and the weights are not quantised")
    try:
        return Spec(
            _shape(config, where), precision, dtype, mapping.get("tp_size", 1), mapping.get("pp_size", 1),
            bool(config.get("use_parallel_embedding", False)), int(bool(config.get("embedding_sharding_dim", 0))),
            quantize_at_build=precision.is_weight_only and not quantized, group_size=group_size,
            kv_cache=_block(config, "quantization", where).get("kv_cache_quant_algo"),
        )  # fmt: skip
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_built_in(config: dict[str, Any], where: Path) -> None:
    quantization = _block(config, "quantization", where)
    unknown = [key for key in quantization if key not in (*_QUANTIZATION, *_BUILT_IN_QUANTIZATION)]
    if unknown:
        raise CheckpointError(f"{where}: quantization.{unknown[0]} is not known to TensorRT-LLM 1.x; remove it")
    excluded = quantization.get("exclude_modules")
    if quantization.get("quant_algo") is not None and excluded is not None:  # else nothing is quantised
        names = excluded if isinstance(excluded, list) and quantization["quant_algo"] not in _OWN_EXCLUSIONS else []
        if "lm_head" not in names or not set(map(str, names)) <= set(_EXCLUDED):
            if quantization["quant_algo"] == "W8A16" and "modelopt" in str(config.get("producer")):
                raise CheckpointError(f"{where}: {_MODELOPT_INT8}")
            raise CheckpointError(f"{where}: quantization.exclude_modules is {excluded!r}; null can be built here, "
                                  f"and ['lm_head'] where it is not {' or '.join(_OWN_EXCLUSIONS)}")  # fmt: skip
    for block, found, rules in (
        ("", config, _BUILT_IN), ("quantization.", quantization, _BUILT_IN_QUANTIZATION),
        ("mapping.", _block(config, "mapping", where), _BUILT_IN_MAPPING),
        ("moe.", _block(config, "moe", where), _BUILT_IN_MOE),
    ):  # fmt: skip
        for key, (absent, built_in) in rules.items():
            if (value := found.get(key, absent)) not in built_in:
                said = f"{value!r}" if key in found else f"not there, which means {value!r}"
                raise CheckpointError(f"{where}: {block}{key} is {said}; only {built_in[0]!r} can be built here")


def _block(config: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    block = config.get(key) or {}
    if not isinstance(block, dict):
        raise CheckpointError(f"{where}: {key} is {block!r}, and an object is needed; convert the model again")
    return block


def _precision(config: dict[str, Any], dtype: str, where: Path) -> tuple[Precision, int | None]:
    """The precision, and the size of groups where it has them (TensorRT-LLM takes 128 where it is not said)."""
    quantization = _block(config, "quantization", where)
    algorithm, factors = quantization.get("quant_algo"), quantization.get("pre_quant_scale", False)
    if algorithm == "W4A16_AWQ" and factors is False:
        precision = Precision.INT4_WEIGHT_ONLY
    else:
        known = [Precision(dtype), *(each for each in Precision if each.weight_bits < 16)]
        found = [each for each in known if each.quant_algo() == algorithm]
        if not found:
            names = ", ".join(str(each.quant_algo()) for each in known[1:])
            raise CheckpointError(f"{where}: quant_algo {algorithm!r} is not known here; null, {names} are")
        precision = found[0]
    has_factors = precision.default_group_size is not None
    if factors is not has_factors and not (precision is Precision.INT8_SQ and factors is True):
        raise CheckpointError(f"{where}: quantization.pre_quant_scale is {factors!r}, which {algorithm} cannot have")
    grouped = algorithm in ("W4A16_AWQ", "W4A8_AWQ")
    return precision, quantization.get("group_size", GROUP_SIZES[-1]) if grouped else None


def _shape(config: dict[str, Any], where: Path) -> ModelShape:
    """Sizes and constants, with TensorRT-LLM's defaults for keys that are left out."""

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
            raise CheckpointError(f"{where}: {key} is {value!r}, and a whole number above 0 is needed")
        return value

    def number(key: str, default: float) -> float:
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"{where}: {key} is {value!r}, and a number above 0 is needed")
        return float(value)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    shape = ModelShape(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size", 4 * hidden),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        max_positions=size("max_position_embeddings"),
        norm_epsilon=number("norm_epsilon", 1e-5),
        rotary_share=number("rotary_pct", 1.0),
        rotary_base=number("rotary_base", 10000.0),
        tied_embeddings=False,
        dtype=config.get("dtype"),
    )
    head_size = size("head_size", max(hidden // heads, 1))
    if head_size != shape.head_size or head_size * heads != hidden:
        raise CheckpointError(f"{where}: head_size {head_size} x {heads} heads is not {hidden}")
    if shape.rotary_share > 1 or shape.rotary_size < 2 or shape.rotary_size % 2:
        raise CheckpointError(
            f"{where}: rotary_pct {shape.rotary_share} of {head_size} makes {shape.rotary_size} rotated elements; "
            "an even number of at least 2, and at most all, is needed"
        )
    return shape
