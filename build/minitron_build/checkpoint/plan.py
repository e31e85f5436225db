"""What a rank's file will hold: pure data, made from a ``Spec`` alone, walked once by whoever writes or checks.

Source of names and splits: TensorRT-LLM 1.x ``models/gpt/convert.py``, 1.2.0rc2 ``mapping.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum, auto

from minitron.model.precision import Precision
from minitron_build.checkpoint.spec import Spec
from minitron_build.sources.model import EMBEDDING, HEAD

_STORED = {"float16": "F16", "bfloat16": "BF16"}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1}


class Rule(Enum):
    """How a tensor's values come about."""

    CAST = auto()  # the source's rows, rounded to the checkpoint's dtype
    NORM = auto()  # the same, plus one, in that dtype
    CODES = auto()  # weight-only codes in the GPU's layout; the next planned tensor is their SCALES
    SCALES = auto()
    GROUP_CODES = auto()  # 4-bit codes in groups, as they are (groups.py); the next planned tensor is their SCALES
    FACTORS = auto()  # what the inputs of the linear module are multiplied with, by a calibration
    KV_SCALE = auto()  # what a unit of an 8-bit key or value of the layer stands for, by a calibration
    FOREIGN = auto()  # of a kind that is read and not made
    POSITIONS = auto()  # rotary tables, see values.py
    INVERSE_FREQUENCIES = auto()
    POSITIONS_FOR_ATTENTION = auto()


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of a source tensor, and of those the columns ``left`` to ``right`` (all if None)."""

    tensor: str
    start: int
    stop: int
    left: int = 0
    right: int | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a rank's file: ``dtype`` as safetensors spells it, ``shape`` as stored.

    ``parts``, one below the other, make a matrix of ``rows`` rows (output channels); rows beyond them are zero.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: Rule
    rows: int
    parts: tuple[Part, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def columns(self) -> int:
        """Elements in a row of the matrix."""
        if self.rule in (Rule.CODES, Rule.GROUP_CODES):
            return self.shape[0] if self.rule is Rule.CODES else self.shape[1]
        return math.prod(self.shape) // self.rows


def plan_rank(spec: Spec, rank: int) -> list[PlannedTensor]:
    """All tensors of ``rank{rank}.safetensors`` in file order: four-byte types first, so that all stay aligned."""
    tp_rank, pp_rank = rank % spec.tp, rank // spec.tp
    planner = _Planner(spec, tp_rank)
    planned = planner.rotary_tables()
    if pp_rank == 0:
        planned += planner.embedding()
    for local, layer in enumerate(pipeline_layers(spec.shape.num_layers, pp_rank, spec.pp)):
        planned += planner.layer(f"transformer.layers.{local}", f"model.layers.{layer}")
    if pp_rank == spec.pp - 1:
        planned += planner.norm("transformer.ln_f", "model.norm")
        planned += planner.head()
    return planned


def pipeline_layers(layers: int, pp_rank: int, pp: int) -> range:
    """The layers of a pipeline rank: as even as possible, the first ranks take one extra."""
    each, extra = divmod(layers, pp)
    start = pp_rank * each + min(pp_rank, extra)
    return range(start, start + each + (pp_rank < extra))


def share(size: int, tp_rank: int, tp: int) -> tuple[int, int]:
    """A rank's part of ``size`` rows or columns cut into ``tp``; a remainder makes the last part shorter."""
    each = -(-size // tp)
    return min(tp_rank * each, size), min((tp_rank + 1) * each, size)


class _Planner:
    """Plans for one tensor parallel rank; methods return the planned tensors of one module."""

    def __init__(self, spec: Spec, tp_rank: int) -> None:
        self._spec, self._shape, self._tp_rank = spec, spec.shape, tp_rank
        self._dtype = _STORED[spec.dtype]

    def rotary_tables(self) -> list[PlannedTensor]:
        positions, size = self._shape.max_positions, self._shape.rotary_size
        return [
            PlannedTensor("embed_positions", "F32", (1, positions, size), Rule.POSITIONS, positions),
            PlannedTensor("rotary_inv_freq", "F32", (size // 2,), Rule.INVERSE_FREQUENCIES, size // 2),
            PlannedTensor("embed_positions_for_gpt_attention", "F32", (1, positions * size),
                          Rule.POSITIONS_FOR_ATTENTION, positions),
        ]  # fmt: skip

    def embedding(self) -> list[PlannedTensor]:
        vocab, hidden, name = self._shape.vocab_size, self._shape.hidden_size, "transformer.vocab_embedding"
        if not self._spec.use_parallel_embedding:
            return [self._cast(name, vocab, hidden, (Part(EMBEDDING, 0, vocab),))]
        if self._spec.embedding_sharding_dim == 0:
            return [self._vocabulary_share(name, EMBEDDING)]
        left, right = self._share(hidden)
        return [self._cast(name, vocab, right - left, (Part(EMBEDDING, 0, vocab, left, right),))]

    def head(self) -> list[PlannedTensor]:
        return [self._vocabulary_share("lm_head", HEAD)]

    def _vocabulary_share(self, name: str, tensor: str) -> PlannedTensor:
        rows = -(-self._shape.vocab_size // self._spec.tp)
        start, stop = self._share(self._shape.vocab_size)
        return self._cast(name, rows, self._shape.hidden_size, (Part(tensor, start, stop),))

    def norm(self, name: str, source: str) -> list[PlannedTensor]:
        hidden = self._shape.hidden_size
        return [
            PlannedTensor(
                f"{name}.{kind}", self._dtype, (hidden,), rule, hidden, (Part(f"{source}.{kind}", 0, hidden),)
            )
            for kind, rule in (("weight", Rule.NORM), ("bias", Rule.CAST))
        ]

    def layer(self, name: str, source: str) -> list[PlannedTensor]:
        hidden, inner, tp = self._shape.hidden_size, self._shape.intermediate_size, self._spec.tp
        up = (Part(f"{source}.mlp.up_proj.weight", *self._share(inner)),)
        down = (Part(f"{source}.mlp.down_proj.weight", 0, hidden, *self._share(inner)),)
        out = (Part(f"{source}.self_attn.o_proj.weight", 0, hidden, *self._share(hidden)),)
        return [
            *self.norm(f"{name}.input_layernorm", f"{source}.input_layernorm"),
            *self._kv_scale(f"{name}.attention", f"{source}.self_attn"),
            *self._linear(f"{name}.attention.qkv", hidden, self._qkv(f"{source}.self_attn")),
            *self._linear(f"{name}.attention.dense", hidden // tp, out),
            *self.norm(f"{name}.post_layernorm", f"{source}.post_attention_layernorm"),
            *self._linear(f"{name}.mlp.fc", hidden, up),
            *self._linear(f"{name}.mlp.proj", inner // tp, down),
        ]

    def _qkv(self, source: str) -> tuple[Part, ...]:
        """The rank's rows of q, then k, then v; with fewer kv heads than ranks, each kv head serves several ranks."""
        size, kv_heads = self._shape.head_size, self._shape.num_kv_heads
        repeats = max(self._spec.tp // kv_heads, 1)
        first, last = share(kv_heads * repeats, self._tp_rank, self._spec.tp)
        kv = first // repeats * size, -(-last // repeats) * size
        return (
            Part(f"{source}.q_proj.weight", *self._share(self._shape.hidden_size)),
            Part(f"{source}.k_proj.weight", *kv),
            Part(f"{source}.v_proj.weight", *kv),
        )

    def _linear(self, name: str, ins: int, parts: tuple[Part, ...]) -> list[PlannedTensor]:
        outs = sum(part.stop - part.start for part in parts)
        if not self._spec.writes_codes:
            return [self._cast(name, outs, ins, parts)]
        if self._spec.group_size or self._spec.precision.has_eight_bit_activations:
            return self._grouped_or_foreign(name, ins, outs, parts)
        stored = ins, outs * self._spec.precision.weight_bits // 8
        return [
            PlannedTensor(f"{name}.weight", "I8", stored, Rule.CODES, outs, parts),
            PlannedTensor(f"{name}.per_channel_scale", self._dtype, (outs,), Rule.SCALES, outs, parts),
        ]

    def _grouped_or_foreign(self, name: str, ins: int, outs: int, parts: tuple[Part, ...]) -> list[PlannedTensor]:
        """Names and shapes of ModelOpt 0.47.0's export, which is what TensorRT-LLM loads."""
        precision, group = self._spec.precision, self._spec.group_size
        foreign = precision.has_eight_bit_activations

        def tensor(kind: str, dtype: str, shape: tuple[int, ...], rule: Rule) -> PlannedTensor:
            return PlannedTensor(f"{name}.{kind}", dtype, shape, Rule.FOREIGN if foreign else rule, shape[0], parts)

        scaled = (outs, ins // group) if group else (1,) if precision is Precision.FP8 else (outs,)
        stored = (outs // 2, ins) if group else (outs, ins)
        codes = tensor("weight", "F8_E4M3" if precision is Precision.FP8 else "I8", stored, Rule.GROUP_CODES)
        planned = [replace(codes, rows=outs), tensor("weights_scaling_factor", "F32", scaled, Rule.SCALES)]
        if precision in (Precision.INT4_AWQ, Precision.INT8_SQ, Precision.W4A8_AWQ):
            planned.append(tensor("prequant_scaling_factor", self._dtype, (ins,), Rule.FACTORS))
        if foreign:
            planned.append(tensor("activation_scaling_factor", "F32", (1,), Rule.FOREIGN))
        if precision is Precision.W4A8_AWQ:
            planned.append(tensor("weights_scaling_factor_2", "F32", (1,), Rule.FOREIGN))
        return planned

    def _kv_scale(self, name: str, source: str) -> list[PlannedTensor]:
        if self._spec.kv_cache is None:
            return []
        part = Part(f"{source}.k_proj.weight", 0, 1)
        return [PlannedTensor(f"{name}.kv_cache_scaling_factor", "F32", (1,), Rule.KV_SCALE, 1, (part,))]

    def _cast(self, name: str, rows: int, columns: int, parts: tuple[Part, ...]) -> PlannedTensor:
        return PlannedTensor(f"{name}.weight", self._dtype, (rows, columns), Rule.CAST, rows, parts)

    def _share(self, size: int) -> tuple[int, int]:
        return share(size, self._tp_rank, self._spec.tp)
