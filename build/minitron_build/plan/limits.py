"""The limits of an engine, from the workload: what trtllm-build is told and what every later stage keeps to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minitron.errors import UsageError
from minitron.model.runtime_limits import whole_blocks
from minitron.model.shape import ModelShape
from minitron.recipe_model import Percentiles, Recipe, Workload

#: trtllm-build's default of max_num_tokens, and what it warns about (tensorrt_llm/_common.py, 1.x).
DEFAULT_NUM_TOKENS = 8192
MANY_NUM_TOKENS = 16384
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


@dataclass(frozen=True)
class Lengths:
    """Prompt and output of a workload's sequences, in tokens: the median one, and the longest that must be served."""

    typical_input: int
    typical_output: int
    longest_input: int
    longest_total: int

    @property
    def typical_total(self) -> int:
        """Prompt and output of the median sequence."""
        return self.typical_input + self.typical_output


def lengths(work: Workload, shape: ModelShape) -> Lengths:
    """The lengths of a workload; those that it does not give are all that the model's positions allow.

    The median prompt and output are then taken as 512 and 256 tokens, as far as the positions reach.
    """
    inputs, outputs = _percentiles(work.input_tokens), _percentiles(work.output_tokens)
    longest_input = inputs.max if inputs else shape.max_positions
    longest_total = longest_input + outputs.max if inputs and outputs else shape.max_positions
    return Lengths(
        typical_input=inputs.p50 if inputs else min(512, shape.max_positions // 2),
        typical_output=outputs.p50 if outputs else min(256, shape.max_positions // 4),
        longest_input=longest_input,
        longest_total=longest_total,
    )


def _percentiles(tokens: int | Percentiles | None) -> Percentiles | None:
    return Percentiles(p50=tokens, max=tokens) if isinstance(tokens, int) else tokens


def derive(recipe: Recipe, shape: ModelShape, max_batch_size: int) -> Limits:
    """Limits for ``max_batch_size`` sequences of the workload; those that the recipe sets are taken as they are.

    max_input_len: the longest prompt. max_seq_len: longest prompt and longest output together. max_num_tokens: on a GPU
    trtllm-build's default or the longest prompt beside a full batch that decodes, whichever is more, in whole blocks;
    never more than the batch can hold, to which trtllm-build would cut it. Raises UsageError where they contradict the
    model or each other.
    """
    fixed, longest = recipe.limits, lengths(recipe.workload, shape)
    seq_len = fixed.max_seq_len or longest.longest_total
    input_len = fixed.max_input_len or longest.longest_input
    if recipe.workload.input_tokens is None and fixed.max_input_len is None:
        input_len = seq_len
    wanted = CPU_NUM_TOKENS if recipe.target == "cpu" else max(DEFAULT_NUM_TOKENS, input_len + max_batch_size)
    num_tokens = fixed.max_num_tokens or max(max_batch_size, whole_blocks(wanted))
    num_tokens = min(num_tokens, max_batch_size * seq_len)
    return Limits(max_batch_size, input_len, seq_len, num_tokens).check(shape.max_positions)
