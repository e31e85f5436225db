"""The roofline: what no implementation can beat, since weights and cache must be read and products calculated.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009): a step that
reads b bytes and calculates f operations takes at least max(b / bandwidth, f / peak). Scales, norms, activations and
the gathered embedding rows (together under 0.1 % of the bytes) are left out, which keeps it a bound from below.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron.model.shape import ModelShape
from minitron_build.plan.weights import layer_weights


@dataclass(frozen=True)
class Machine:
    """What limits: ``bandwidth`` in bytes/s, ``flops`` in operations/s (None: not known), both of all GPUs together."""

    bandwidth: float
    flops: float | None

    def times(self, count: int) -> Machine:
        """``count`` of them side by side."""
        return Machine(self.bandwidth * count, self.flops * count if self.flops else None)


@dataclass(frozen=True)
class RooflineBound:
    """Least ``seconds`` of a step, and the side that sets them: ``memory`` or ``arithmetic``."""

    seconds: float
    bound_by: str


def time_at_roofline(read_bytes: float, operations: float, machine: Machine) -> RooflineBound:
    """max(bytes / bandwidth, operations / peak)."""
    memory = read_bytes / machine.bandwidth
    arithmetic = operations / machine.flops if machine.flops else 0.0
    return RooflineBound(max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")


def decode_step(
    shape: ModelShape, machine: Machine, *, matrix_bytes: int, kv_bytes: int, batch: int = 1, context_tokens: int = 0
) -> RooflineBound:
    """One token for each of ``batch`` sequences that hold ``context_tokens`` each.

    Reads all matrices once and every sequence's cache; calculates 2 operations per weight and sequence, and for
    attention 4 x layers x hidden per token of context (scores and weighted sum).
    """
    read = matrix_bytes + batch * context_tokens * kv_bytes
    attention = 4 * shape.num_layers * shape.hidden_size * context_tokens
    return time_at_roofline(read, batch * (2 * _decode_weights(shape) + attention), machine)


def prefill(shape: ModelShape, machine: Machine, *, matrix_bytes: int, prompt_tokens: int) -> RooflineBound:
    """The first token of one prompt: linear layers for every token, causal attention, lm_head for the last token only.

    2 x weights x tokens + 2 x layers x hidden x tokens^2 + 2 x vocabulary x hidden operations.
    """
    linear = 2 * shape.num_layers * layer_weights(shape) * prompt_tokens
    attention = 2 * shape.num_layers * shape.hidden_size * prompt_tokens**2
    return time_at_roofline(matrix_bytes, linear + attention + 2 * shape.vocab_size * shape.hidden_size, machine)


def weight_only_pays_below(shape: ModelShape, machine: Machine, *, bytes_16bit: int) -> int | None:
    """The batch from which 16-bit matrices are bound by arithmetic too, so that smaller weights cannot help.

    batch = (bytes / bandwidth) / (2 x weights / peak); cache is left out, since it is the same for every precision.
    The products of weight-only kernels are 16-bit ones, and unpacking costs, so real kernels lose before that.
    """
    if machine.flops is None:
        return None
    return int(bytes_16bit / machine.bandwidth * machine.flops / (2 * _decode_weights(shape)))


def _decode_weights(shape: ModelShape) -> int:
    """Weights that a decoding step multiplies with: linear layers and lm_head."""
    return shape.num_layers * layer_weights(shape) + shape.vocab_size * shape.hidden_size
