"""From a Triton request's tensors to generation requests: names, shapes and rules of TensorRT-LLM's backend.

Source: triton_backend/inflight_batcher_llm/src/utils.cc and model_instance_state.cc of TensorRT-LLM 1.2.0rc8. Scalars
are declared with dims [1] and reshape [], so they arrive as [batch]; lists as [batch, n], word lists as [batch, 2, n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.text import end_ids

from .generation_request import Refused, Request

Tensors = Mapping[str, npt.NDArray[Any]]

_SEED_RANGE = 1 << 64
_MOST_SEQUENCES = 1024  # of one prompt; a wrong number must not fill the memory with requests


@dataclass(frozen=True)
class Wanted:
    """What one Triton request asks for: a row per prompt and, in each, a request per sequence to return."""

    rows: tuple[tuple[Request, ...], ...]
    streaming: bool
    exclude_input: bool
    log_probs: bool
    perf_metrics: bool
    num_input_tokens: bool
    num_output_tokens: bool


def read(tensors: Tensors, *, decoupled: bool, exclude_input: bool, own_end_ids: Sequence[int] = ()) -> Wanted:
    """Read one request; ``exclude_input`` and ``own_end_ids`` are the model's. Raises Refused."""
    if "input_ids" not in tensors:
        raise Refused("Input tensor 'input_ids' is missing")
    batch = len(tensors["input_ids"])
    rows = tuple(_row(tensors, index, batch, own_end_ids) for index in range(batch))
    wanted = Wanted(
        rows=rows,
        streaming=_flag(tensors, "streaming"),
        exclude_input=_flag(tensors, "exclude_input_in_output", exclude_input),
        log_probs=_flag(tensors, "return_log_probs"),
        perf_metrics=_flag(tensors, "return_perf_metrics"),
        num_input_tokens=_flag(tensors, "return_num_input_tokens"),
        num_output_tokens=_flag(tensors, "return_num_output_tokens"),
    )
    if not decoupled and wanted.streaming:
        raise Refused("Streaming is only supported if model is deployed using decoupled mode.")
    if not decoupled and sum(map(len, rows)) > 1:
        raise Refused("Several prompts or sequences in one request are only supported in decoupled mode")
    return wanted


def _row(tensors: Tensors, index: int, batch: int, own_end_ids: Sequence[int]) -> tuple[Request, ...]:
    """The sequences of one prompt; each further one has the next seed."""
    row = _Row(tensors, index)
    _refuse_unsupported(row)
    count = row.integer("num_return_sequences", 1)
    if not 1 <= count <= _MOST_SEQUENCES:
        raise Refused(f"num_return_sequences is {count}: it must be from 1 to {_MOST_SEQUENCES}")
    prompt, seed = row.prompt(batch), row.integer("seed", 0)
    ends = end_ids.meant_by(row.integer("end_id", -1), own_end_ids)
    return tuple(
        Request(
            prompt=prompt,
            max_new_tokens=row.integer("request_output_len", 0),
            end_ids=ends,
            stop_words=row.words("stop_words_list"),
            temperature=row.number("temperature", 1.0),
            top_k=row.integer("runtime_top_k", 0),
            top_p=max(row.number("runtime_top_p", 0.0), 0.0),  # the backend drops what is not above 0
            repetition_penalty=row.number("repetition_penalty", 1.0),
            min_tokens=row.integer("min_tokens", 0),
            seed=(seed + number) % _SEED_RANGE,
            context_logits=_flag(tensors, "return_context_logits"),
        )
        for number in range(count)
    )


def _refuse_unsupported(row: _Row) -> None:
    """Refuse by name what the C++ backend can do and OpenVINO GenAI cannot.

    Presence and frequency penalties: TensorRT-LLM subtracts them from the logit of every token of prompt and output
    (batchApplyPenalty in cpp/tensorrt_llm/kernels/penaltyKernels.cu). OpenVINO GenAI 2026.4 looks at the output alone
    and moves logits towards zero (logit_transformers.hpp), so that a token with a negative logit, once it has come, is
    rewarded; and it takes no logits processing of others.
    """
    beams, ngrams = row.integer("beam_width", 1), row.integer("no_repeat_ngram_size", 0)
    presence, frequency = row.number("presence_penalty", 0.0), row.number("frequency_penalty", 0.0)
    asked = [
        ("beam_width", f"is {beams}", beams != 1),
        ("bad_words_list", "has words", len(row.words("bad_words_list")) > 0),
        ("embedding_bias", "has values", row.has_values("embedding_bias")),
        ("presence_penalty", f"is {presence:g}", presence != 0),
        ("frequency_penalty", f"is {frequency:g}", frequency != 0),
        ("no_repeat_ngram_size", f"is {ngrams}", ngrams != 0),
        ("runtime_top_p_decay", "is not 1", row.number("runtime_top_p_decay", 1.0) != 1.0),
        ("return_generation_logits", "is true", _flag(row.tensors, "return_generation_logits")),
    ]
    for name, what, is_asked in asked:
        if is_asked:
            raise Refused(f"{name} {what}: that is not supported by the CPU engine")


@dataclass(frozen=True)
class _Row:
    """One row of the batch."""

    tensors: Tensors
    index: int

    def integer(self, name: str, default: int) -> int:
        return int(self._scalar(name, default))

    def number(self, name: str, default: float) -> float:
        return float(self._scalar(name, default))

    def has_values(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name][self.index].size > 0

    def prompt(self, batch: int) -> list[int]:
        """Token ids without padding; a single prompt has none, and its length must say so."""
        ids: list[int] = self.tensors["input_ids"][self.index].reshape(-1).tolist()
        length = self.integer("input_lengths", len(ids))
        if not 0 <= length <= len(ids) or (batch == 1 and length != len(ids)):
            raise Refused(f"input_lengths is {length} and input_ids has {len(ids)} tokens: they must be equal")
        return ids[:length]

    def words(self, name: str) -> tuple[tuple[int, ...], ...]:
        """A word list: row 0 all token ids, row 1 where each word ends, then -1."""
        if not self.has_values(name):
            return ()
        words = self.tensors[name][self.index]
        if words.ndim != 2 or words.shape[0] != 2:
            raise Refused(f"{name} has shape {list(words.shape)}: it must be [2, n]")
        ids, ends = words.tolist()
        found, start = [], 0
        for position, end in enumerate(ends):
            if end == -1:
                if any(other != -1 for other in ends[position:]):
                    raise Refused(f"{name} is malformed: after the first -1 every offset must be -1")
                break
            if not start < end <= len(ids):
                raise Refused(f"{name} is malformed: offset {end} must be above {start} and at most {len(ids)}")
            found.append(tuple(ids[start:end]))
            start = end
        return tuple(found)

    def _scalar(self, name: str, default: float) -> Any:
        if name not in self.tensors:
            return default
        values = self.tensors[name].reshape(-1)
        if self.index >= values.size:
            raise Refused(f"{name} has {values.size} values: it must have one for each prompt of the batch")
        return values[self.index].item()


def _flag(tensors: Tensors, name: str, default: bool = False) -> bool:
    """A switch of the whole request: that of the first row."""
    if name not in tensors or tensors[name].size == 0:
        return default
    return bool(np.asarray(tensors[name]).reshape(-1)[0])
