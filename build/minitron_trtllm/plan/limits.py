"""The limits of an engine, from the workload: what trtllm-build is told and what every later stage keeps to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minitron_trtllm.errors import UsageError
from minitron_trtllm.recipe_model import Recipe, Workload
from minitron_trtllm.shape import ModelShape

#: trtllm-build's default of max_num_tokens, and what it warns about (tensorrt_llm/_common.py, 1.x).
DEFAULT_NUM_TOKENS = 8192
MANY_NUM_TOKENS = 16384
#: Tokens of a KV cache block, trtllm-build's default of --tokens_per_block (tensorrt_llm/plugin/plugin.py, 1.x).
TOKENS_PER_BLOCK = 32
#: Tokens of one step of the CPU engine: short enough that running streams wait a bounded time for another's prompt.
CPU_NUM_TOKENS = 256


@dataclass(frozen=True)
class Limits:
    """What an engine accepts at most, under trtllm-build's names; all lengths in tokens.

    ``max_batch_size``: sequences that generate at the same time. ``max_input_len``: of a prompt. ``max_seq_len``: of
    prompt and output together. ``max_num_tokens``: taken in one step, over all sequences.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int

    @property
    def tokens_per_sequence(self) -> int:
        """KV cache tokens that the longest sequence takes: whole blocks."""
        return whole_blocks(self.max_seq_len)

    def check(self, max_positions: int) -> Limits:
        """Return the limits; raises UsageError where they cannot be together, or in a model of so many positions."""
        for name, value in asdict(self).items():
            if value < 1:
                raise UsageError(f"{name} {value} makes no sense: it must be 1 or more")
        if self.max_seq_len > max_positions:
            raise UsageError(f"max_seq_len {self.max_seq_len} is more than the {max_positions} positions of the model")
        if self.max_input_len > self.max_seq_len:
            raise UsageError(f"max_input_len {self.max_input_len} is more than max_seq_len {self.max_seq_len}")
        if self.max_num_tokens < self.max_batch_size:
            raise UsageError(
                f"max_num_tokens {self.max_num_tokens} is less than max_batch_size {self.max_batch_size}: "
                "each sequence takes a token in every step"
            )
        return self


def derive(recipe: Recipe, shape: ModelShape, max_batch_size: int) -> Limits:
    """Limits for ``max_batch_size`` sequences of the workload; those that the recipe sets are taken as they are.

    max_input_len: the longest prompt. max_seq_len: longest prompt and longest output together. max_num_tokens: on a GPU
    trtllm-build's default or the longest prompt beside a full batch that decodes, whichever is more; never more than
    the batch can hold, and whole blocks. Raises UsageError where they contradict the model or each other.
    """
    fixed, work = recipe.limits, recipe.workload
    input_len = fixed.max_input_len or Workload.longest(work.input_tokens)
    seq_len = fixed.max_seq_len or input_len + Workload.longest(work.output_tokens)
    wanted = CPU_NUM_TOKENS if recipe.target == "cpu" else max(DEFAULT_NUM_TOKENS, input_len + max_batch_size)
    num_tokens = fixed.max_num_tokens or max(max_batch_size, whole_blocks(min(wanted, max_batch_size * seq_len)))
    return Limits(max_batch_size, input_len, seq_len, num_tokens).check(shape.max_positions)


def whole_blocks(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of the KV cache block."""
    return -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
