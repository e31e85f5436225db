"""Bytes of weights and of KV cache, exactly as the checkpoint holds them and the engine keeps them.

Sizes and which tensors are quantised follow TensorRT-LLM's GPT model with gpt_variant "nemotron"
(models/gpt/convert.py, quantization/quantize.py, 1.2): the four linear weights of a layer are quantised, embedding,
lm_head and norms never are.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron.errors import UsageError
from minitron.model.precision import Precision
from minitron.model.shape import ModelShape

_BYTES_16BIT = 2
_BYTES_FLOAT32 = 4
_WEIGHT_ONLY_MULTIPLE = 64


@dataclass(frozen=True)
class Parallel:
    """How a model is divided: ``tensor`` GPUs share each layer, ``pipeline`` groups take the layers in turn.

    ``split_embedding``: whether the embedding is divided by ``tensor`` too, by rows (0) or columns (1).
    """

    tensor: int = 1
    pipeline: int = 1
    split_embedding: int | None = None

    @property
    def world_size(self) -> int:
        """Number of GPUs."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class WeightBytes:
    """Bytes by part. ``layers``: codes and scales of groups; ``small``: norms, scales of channels, rotary tables."""

    embedding: int
    layers: int
    lm_head: int
    small: int

    @property
    def matrices(self) -> int:
        """Embedding, linear layers and lm_head."""
        return self.embedding + self.layers + self.lm_head

    @property
    def total(self) -> int:
        """Everything in the checkpoint's tensors."""
        return self.matrices + self.small

    @property
    def read_per_token(self) -> int:
        """What one decoding step must read: all matrices but the embedding, of which it gathers single rows."""
        return self.layers + self.lm_head


def check(shape: ModelShape, precision: Precision, parallel: Parallel, group_size: int | None = None) -> None:
    """Raise UsageError where the model cannot be divided that way."""
    tp, heads, kv_heads = parallel.tensor, shape.num_heads, shape.num_kv_heads
    if heads % tp or shape.intermediate_size % tp or (kv_heads % tp and tp % kv_heads):
        raise UsageError(
            f"tensor_parallel {tp} does not divide {heads} heads, {kv_heads} key/value heads and an intermediate size "
            f"of {shape.intermediate_size}; try {_divisors(shape)}"
        )
    if parallel.pipeline > shape.num_layers:
        raise UsageError(f"pipeline_parallel {parallel.pipeline} is more than the {shape.num_layers} layers there are")
    sizes = (shape.hidden_size, qkv_rows(shape, tp), shape.hidden_size // tp, shape.intermediate_size // tp)
    inputs = (shape.hidden_size, shape.hidden_size // tp, shape.intermediate_size // tp)
    if group_size and any(size % group_size for size in inputs):
        raise UsageError(
            f"group_size {group_size} does not divide the {', '.join(map(str, inputs))} inputs per GPU of "
            f"tensor_parallel {tp}; use a smaller group_size or tensor_parallel"
        )
    if precision.weight_bits < 16 and any(size % _WEIGHT_ONLY_MULTIPLE for size in sizes):
        raise UsageError(
            f"{precision.value} with tensor_parallel {tp} makes matrices of {', '.join(map(str, sizes))} per GPU, and "
            f"multiples of {_WEIGHT_ONLY_MULTIPLE} are needed; use a smaller tensor_parallel or a 16-bit precision"
        )


def _divisors(shape: ModelShape) -> str:
    fitting = [tp for tp in (1, 2, 4, 8) if not shape.num_heads % tp and not shape.intermediate_size % tp]
    return ", ".join(map(str, fitting))


def kv_heads_per_gpu(shape: ModelShape, tp: int) -> int:
    """Key/value heads on one GPU; where there are fewer heads than GPUs each is repeated."""
    return max(1, shape.num_kv_heads // tp)


def qkv_rows(shape: ModelShape, tp: int) -> int:
    """Rows of the fused query, key and value matrix on one GPU."""
    return (shape.num_heads // tp + 2 * kv_heads_per_gpu(shape, tp)) * shape.head_size


def layers_of_stage(shape: ModelShape, parallel: Parallel, stage: int) -> int:
    """Layers of a pipeline stage: as even as possible, the first stages take one more (mapping.py, 1.x)."""
    each, more = divmod(shape.num_layers, parallel.pipeline)
    return each + (stage < more)


def layer_weights(shape: ModelShape, tp: int = 1) -> int:
    """Elements of one layer's four linear weights on one GPU: qkv, attention.dense, mlp.fc, mlp.proj."""
    hidden = shape.hidden_size
    return hidden * (qkv_rows(shape, tp) + hidden // tp + 2 * (shape.intermediate_size // tp))


def stage_bytes(
    shape: ModelShape, precision: Precision, parallel: Parallel, stage: int, group_size: int | None = None
) -> WeightBytes:
    """Bytes of one rank of pipeline ``stage`` (all ranks of a stage hold equally much).

    Linear weights take weight_bits each, and quantised ones 2 more bytes per output channel for the scale, or for each
    group of ``group_size`` inputs of it (the checkpoint has 4; TensorRT-LLM casts them when it loads them, 1.x
    ``models/modeling_utils.py``): those are counted with the layers, since a step reads them too. lm_head rows are
    padded to a multiple of ``tensor``. A tied head is stored twice in a checkpoint, and counted so.
    """
    tp, hidden = parallel.tensor, shape.hidden_size
    first, last = stage == 0, stage == parallel.pipeline - 1
    layers = layers_of_stage(shape, parallel, stage)
    padded_vocab = -(-shape.vocab_size // tp) * tp
    embedding = shape.vocab_size * hidden
    if parallel.split_embedding is not None:
        embedding = (padded_vocab if parallel.split_embedding == 0 else shape.vocab_size) * hidden // tp
    norms = (4 * layers + 2 * last) * hidden
    channels = qkv_rows(shape, tp) + 2 * hidden + shape.intermediate_size // tp
    scales = layers * channels * (precision.weight_bits < 16 and group_size is None)
    held = layers * layer_weights(shape, tp)
    group_scales = held // group_size * _BYTES_16BIT if group_size else 0
    tables = 2 * shape.max_positions * shape.rotary_size + shape.rotary_size // 2
    return WeightBytes(
        embedding=embedding * _BYTES_16BIT * first,
        layers=held * precision.weight_bits // 8 + group_scales,
        lm_head=padded_vocab // tp * hidden * _BYTES_16BIT * last,
        small=(norms + scales) * _BYTES_16BIT + tables * _BYTES_FLOAT32,
    )


def model_bytes(shape: ModelShape, precision: Precision, group_size: int | None = None) -> WeightBytes:
    """Bytes of the undivided model."""
    return stage_bytes(shape, precision, Parallel(), 0, group_size)


def kv_bytes_per_token(shape: ModelShape, tp: int = 1, layers: int | None = None, element_bytes: float = 2) -> int:
    """Bytes of KV cache that one token takes on one GPU: keys and values of every layer and key/value head.

    2 x layers x kv_heads x head_size x element_bytes; 131,072 for Minitron-4B in 16 bits.
    """
    layers = shape.num_layers if layers is None else layers
    return int(2 * layers * kv_heads_per_gpu(shape, tp) * shape.head_size * element_bytes)
