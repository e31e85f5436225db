"""One Triton request and its answers: which tensors each response has, and which response is the last."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from reply import Reply

from .context_logits import Logits
from .cpu_engine import Engine
from .generation import Generation, StepOutput
from .generation_request import Refused, Request
from .metrics import Metrics
from .request_tensors import Wanted

log = logging.getLogger(__name__)

_ALWAYS = ("output_ids", "sequence_length")


@dataclass
class _Sequence:
    """One of the request's sequences and what it has given so far."""

    request: Request
    batch_index: int
    sequence_index: int
    generation: Generation | None = None
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    context_logits: Logits | None = None


class Call:
    """A Triton request on its way through the engine."""

    def __init__(
        self,
        request_id: str,
        reply: Reply,
        wanted: Wanted,
        requested: frozenset[str],
        *,
        engine: Engine,
        metrics: Metrics,
    ) -> None:
        """``requested``: the outputs that the client asked for. Raises Refused where a main one is missing."""
        if missing := [name for name in _ALWAYS if name not in requested]:
            raise Refused(f"Output {missing[0]} was not requested: {' and '.join(_ALWAYS)} must be")
        self.request_id = request_id
        self._reply, self._wanted, self._requested = reply, wanted, requested
        self._engine, self._metrics = engine, metrics
        self._lock = threading.RLock()
        self._sequences = [
            _Sequence(request, row, column)
            for row, requests in enumerate(wanted.rows)
            for column, request in enumerate(requests)
        ]
        self._unfinished = len(self._sequences)

    @property
    def is_done(self) -> bool:
        """Whether the last response is out."""
        return self._unfinished == 0

    def start(self) -> None:
        """Hand all sequences to the engine; one that it refuses is answered with the reason."""
        for sequence in self._sequences:
            with self._lock:
                try:
                    sequence.generation = self._engine.submit(sequence.request, self._receiver(sequence))
                except Refused as error:
                    self._take(sequence, StepOutput(error=str(error)))

    def cancel(self) -> None:
        """End what is still running; the answers then end as usual."""
        for sequence in self._sequences:
            if sequence.generation is not None:
                self._engine.cancel(sequence.generation)

    def cancel_if_abandoned(self) -> None:
        """Cancel where the client went away or said so."""
        with self._lock:
            if self._reply.has_left():
                self.cancel()

    def _receiver(self, sequence: _Sequence) -> Any:
        def receive(chunk: StepOutput) -> None:
            with self._lock:
                self._take(sequence, chunk)

        return receive

    def _take(self, sequence: _Sequence, chunk: StepOutput) -> None:
        """Answer with a chunk, or keep it until the sequence is whole."""
        if self.is_done:
            return
        sequence.token_ids += chunk.token_ids
        sequence.log_probs += chunk.log_probs
        if chunk.context_logits is not None:
            sequence.context_logits = chunk.context_logits
        if chunk.is_last:
            self._unfinished -= 1
            self._metrics.observe(len(sequence.request.prompt), len(sequence.token_ids))
        elif not self._wanted.streaming:
            return
        try:
            response = self._response(sequence, chunk)
        except Exception:
            log.exception("an answer could not be made")
            response = error_response("The answer could not be made", sequence.generation)
        self._send(response, failed=chunk.error is not None)
        self.cancel_if_abandoned()  # here too, so that a stream ends with the next step, not with the next poll

    def _send(self, response: Any, *, failed: bool) -> None:
        """Send one response, the last one with the final flag. An error ends the whole request: none may follow it."""
        if failed:
            self._unfinished = 0
            self.cancel()
        if self.is_done:
            self._reply.close(response)
        else:
            self._reply.send(response)

    def _response(self, sequence: _Sequence, chunk: StepOutput) -> Any:
        if chunk.error is not None:
            return error_response(chunk.error, sequence.generation)
        tensors = self._tensors(sequence, chunk)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in self._requested]
        )

    def _tensors(self, sequence: _Sequence, chunk: StepOutput) -> dict[str, npt.NDArray[Any]]:
        """Output tensors of one response, with the batch axis (always 1)."""
        wanted, request = self._wanted, sequence.request
        new = list(chunk.token_ids) if wanted.streaming else sequence.token_ids
        echo = [] if wanted.streaming or wanted.exclude_input else list(request.prompt)
        tensors = {
            "output_ids": np.array([[echo + new]], np.int32).reshape(1, 1, -1),
            "sequence_length": _scalar(len(echo) + len(new), np.int32),
        }
        if wanted.log_probs:
            log_probs = list(chunk.log_probs) if wanted.streaming else sequence.log_probs
            tensors["output_log_probs"] = np.array([[log_probs]], np.float32).reshape(1, 1, -1)
            tensors["cum_log_probs"] = _scalar(sum(sequence.log_probs), np.float32)
        if sequence.context_logits is not None:  # once
            tensors["context_logits"], sequence.context_logits = sequence.context_logits[None], None
        if len(wanted.rows) > 1:
            tensors["batch_index"] = _scalar(sequence.batch_index, np.int32)
        if len(wanted.rows[sequence.batch_index]) > 1:
            tensors["sequence_index"] = _scalar(sequence.sequence_index, np.int32)
        if wanted.num_input_tokens:
            tensors["num_input_tokens"] = _scalar(len(request.prompt), np.int32)
        if wanted.num_output_tokens:
            tensors["num_output_tokens"] = _scalar(len(new), np.int32)
        if wanted.perf_metrics and chunk.is_last and sequence.generation is not None:
            tensors |= _perf_tensors(sequence.generation)
        return tensors


def error_response(text: str, generation: Generation | None = None) -> Any:
    """An error as the C++ backend gives it: always code INTERNAL, so the text has to tell."""
    if generation is not None:
        text = f"Executor failed process requestId {generation.id} due to the following error: {text}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INTERNAL))


def _perf_tensors(generation: Generation) -> dict[str, npt.NDArray[Any]]:
    """Moments in ns of the engine's own clock; blocks are those set aside; nothing is drafted without prompt lookup."""
    times, blocks, drafts = generation.times, generation.blocks, generation.drafts
    drafted, accepted = (drafts.drafted, drafts.accepted) if drafts else (0, 0)
    return {
        "kv_cache_alloc_new_blocks": _scalar(blocks, np.int32),
        "kv_cache_reused_blocks": _scalar(0, np.int32),
        "kv_cache_alloc_total_blocks": _scalar(blocks, np.int32),
        "arrival_time_ns": _scalar(times.arrival_ns, np.int64),
        "first_scheduled_time_ns": _scalar(times.first_scheduled_ns, np.int64),
        "first_token_time_ns": _scalar(times.first_token_ns, np.int64),
        "last_token_time_ns": _scalar(times.last_token_ns, np.int64),
        "acceptance_rate": _scalar(accepted / max(1, drafted), np.float32),
        "total_accepted_draft_tokens": _scalar(accepted, np.int32),
        "total_draft_tokens": _scalar(drafted, np.int32),
    }


def _scalar(value: float, dtype: Any) -> npt.NDArray[Any]:
    return np.array([[value]], dtype)
