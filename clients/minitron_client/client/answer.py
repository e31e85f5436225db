"""What comes back: responses become chunks as they arrive, and one response in the end.

``Exchange`` is the whole life of one request without any input or output; the blocking and the asynchronous client feed
it with messages and read what became of them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minitron import failures
from minitron.errors import Cancelled, ClientError, DeadlineExceeded, StreamBroken
from minitron_client.client import dialect, local_text
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import Deadline, Retry
from minitron_client.client.request import Request
from minitron_client.client.tensors import unpack
from minitron_client.client.timing import Timing

# How long a request that was told to stop may take to end before its stream is cancelled all the same.
STOP_GRACE_S = 5.0

_PERF = ("kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks", "arrival_time_ns",
         "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns", "acceptance_rate",
         "total_accepted_draft_tokens", "total_draft_tokens")  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """One response of the server for one sequence.

    ``text`` is what is new since the chunk before ("" from ``tensorrt_llm``, which sends ``token_ids``, and while a
    character is incomplete). ``token_count``: generated tokens in this response as counted by the server, None where
    it did not say. ``received_ns``: monotonic clock. ``index``: which sequence, where several were asked for.
    ``finish_reason``, on the last chunk: as the server sent it, else ``length`` where the tokens reached max_tokens and
    ``stop`` where they did not, None where they were not counted.
    """

    text: str
    token_count: int | None
    received_ns: int
    index: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    log_probs: tuple[float, ...] = ()
    cumulative_log_prob: float | None = None
    input_token_count: int | None = None
    perf: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """One generated sequence; fields as in ``Chunk``, joined over its chunks."""

    text: str
    token_ids: tuple[int, ...]
    token_count: int | None
    finish_reason: str | None
    log_probs: tuple[float, ...]
    cumulative_log_prob: float | None


@dataclass(frozen=True)
class Response:
    """The whole answer to a request: its sequences (one, unless more were asked for) and when it came."""

    request_id: str
    model: str
    outputs: tuple[Output, ...]
    input_token_count: int | None
    timing: Timing
    perf: Mapping[str, float]

    @property
    def text(self) -> str:
        """Text of the first sequence."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sequence, from ``tensorrt_llm`` itself."""
        return self.outputs[0].token_ids

    @property
    def token_count(self) -> int | None:
        """Generated tokens of the first sequence as counted by the server."""
        return self.outputs[0].token_count

    @property
    def finish_reason(self) -> str | None:
        """Why the first sequence ended: as sent, or ``length`` or ``stop``."""
        return self.outputs[0].finish_reason


class Exchange:
    """One request on its way: the message to send, the responses taken in, and whether it may be sent again."""

    def __init__(
        self, model: ServedModel, request: Request, url: str, *, stream: bool, deadline: Deadline, retry: Retry
    ) -> None:
        request.check()
        self.model, self.request, self.url, self._retry = model, request, url, retry
        self.streaming = stream and model.decoupled
        self.request_id = request.request_id or uuid.uuid4().hex
        self.message = dialect.message(model, request, self.request_id, stream=self.streaming)
        self._local = model.text.begin(self.message) if model.text else None
        self.final = self.stopped = self.expired = self.leaves_engine = False
        self.deadline = deadline
        self._tried = 0
        self._sent_ns = 0
        self._chunks: list[Chunk] = []
        self._times: list[tuple[int, int | None]] = []
        self._texts: dict[int, str] = {}

    @property
    def call_timeout_s(self) -> float | None:
        """The deadline that gRPC watches: later than ours where ours is kept with a ``stop``."""
        left = self.deadline.left_s
        return left if left is None or not self.model.takes_stops else left + STOP_GRACE_S

    def sending(self) -> None:
        """Note that the message goes out now."""
        self._tried += 1
        self._sent_ns = time.monotonic_ns()

    def take(self, response: Any) -> list[Chunk]:
        """The chunks of a ``ModelStreamInferResponse`` that just arrived; raises what its error message means."""
        now_ns = time.monotonic_ns()
        if response.error_message:
            raise self.ended_early() or failures.of_text(response.error_message, self.url)
        infer = response.infer_response
        self.final = bool(infer.parameters["triton_final_response"].bool_param)
        chunks = [self._finished(chunk) for chunk in self._new_text(self._read(infer, now_ns))]
        self._times.append((now_ns, _sum_counts(chunks)))
        self._chunks += chunks
        return chunks

    def _read(self, infer: Any, now_ns: int) -> list[Chunk]:
        """The chunks in a response; where text is made here, an answer ends with its last stop string."""
        if self._local is None:
            return _chunks(*_values(infer), now_ns)
        arrays = _checked(infer, local_text.arrays_of)
        responses = self._local.take(arrays, is_final=self.final)
        self.leaves_engine = self._local.is_over and not self.final
        self.final = self._local.is_over
        chunks = [chunk for one in responses for chunk in _chunks(*local_text.as_values(one), now_ns)]
        return chunks or _chunks({}, {}, now_ns)

    def failure(self, error: Any) -> ClientError:
        """The error that a failed call means."""
        return self.ended_early() or failures.of_status(error, self.url, streaming=bool(self._times))

    def check_whole(self) -> None:
        """To be called at the stream's orderly end; raises if that came before the last response."""
        if early := self.ended_early():
            raise early
        if not self.final:
            raise StreamBroken(f"{self.url}: the stream ended before the last response; the answer is incomplete")

    def retry_delay_s(self, error: ClientError) -> float | None:
        """Seconds after which the request may be sent again, or None: never once part of an answer has come."""
        return None if self._times or self.stopped else self._retry.delay_s(error, self._tried, self.deadline.left_s)

    def response(self) -> Response:
        """The answer as far as it has come."""
        indices = sorted({chunk.index for chunk in self._chunks}) or [0]
        last = self._chunks[-1] if self._chunks else None
        counts = [chunk.input_token_count for chunk in self._chunks if chunk.input_token_count is not None]
        return Response(
            self.request_id, self.model.name, tuple(map(self._output, indices)),
            counts[0] if counts else len(self.request.input_ids) if self.request.input_ids is not None else None,
            Timing(self._sent_ns, tuple(self._times), self.streaming), last.perf if last else {},
        )  # fmt: skip

    def ended_early(self) -> ClientError | None:
        """Our own reason for an end before the last response, which comes before whatever the server says of it."""
        if self.expired:
            return DeadlineExceeded(f"{self.url}: no complete answer within the deadline")
        return Cancelled(f"{self.url}: request {self.request_id} was cancelled") if self.stopped else None

    def _new_text(self, chunks: list[Chunk]) -> list[Chunk]:
        """Where the model repeats what came before, keep what is new."""
        if not (self.model.cumulative and self.streaming):
            return chunks
        fresh = []
        for chunk in chunks:
            known = self._texts.get(chunk.index, "")
            self._texts[chunk.index] = chunk.text or known
            fresh.append(replace(chunk, text=chunk.text[len(known) :]))
        return fresh

    def _finished(self, chunk: Chunk) -> Chunk:
        if not self.final or chunk.finish_reason:
            return chunk
        return replace(chunk, finish_reason=self._reason([*self._of(chunk.index), chunk]))

    def _of(self, index: int) -> list[Chunk]:
        return [chunk for chunk in self._chunks if chunk.index == index]

    def _reason(self, chunks: Sequence[Chunk]) -> str | None:
        sent = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
        count = _sum_counts(chunks)
        if sent or count is None or not self.final:
            return sent[-1] if sent else None
        return "length" if count >= self.request.max_tokens else "stop"

    def _output(self, index: int) -> Output:
        chunks = self._of(index)
        return Output(
            "".join(chunk.text for chunk in chunks),
            tuple(token for chunk in chunks for token in chunk.token_ids),
            _sum_counts(chunks), self._reason(chunks),
            tuple(log_prob for chunk in chunks for log_prob in chunk.log_probs),
            next((one.cumulative_log_prob for one in reversed(chunks) if one.cumulative_log_prob is not None), None),
        )  # fmt: skip


def _sum_counts(chunks: Sequence[Chunk]) -> int | None:
    counts = [chunk.token_count for chunk in chunks]
    return None if None in counts or not counts else sum(count or 0 for count in counts)


_Values = dict[str, list[Any]]
_Shapes = dict[str, tuple[int, ...]]


def _values(infer: Any) -> tuple[_Values, _Shapes]:
    """Flat values and shapes of a ``ModelInferResponse``."""

    def read(infer: Any) -> _Values:
        tensors = zip(infer.outputs, infer.raw_output_contents, strict=True)
        return {tensor.name: unpack(tensor.datatype, raw) for tensor, raw in tensors}

    return _checked(infer, read), {tensor.name: tuple(tensor.shape) for tensor in infer.outputs}


def _checked(infer: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(infer)
    except ValueError as error:
        raise StreamBroken(f"a response of model {infer.model_name!r} cannot be read: {error}") from error


def _chunks(values: _Values, shapes: _Shapes, received_ns: int) -> list[Chunk]:
    """One chunk per sequence in a response: one, or as many as there are beams."""
    sizes = values.get("sequence_length")
    beams = max(len(sizes or ()), len(values.get("text_output", ())), 1)
    return [_chunk(values, shapes, beam, beams, received_ns) for beam in range(beams)]


def _chunk(values: _Values, shapes: _Shapes, beam: int, beams: int, received_ns: int) -> Chunk:
    def one(name: str) -> Any:
        return values[name][0] if values.get(name) else None

    def row(name: str) -> list[Any]:
        width = shapes[name][-1] if name in values else 0
        return values.get(name, [])[beam * width : (beam + 1) * width]

    count: int | None
    if not values:  # the empty last response
        count = 0
    elif "sequence_length" in values:
        count = int(values["sequence_length"][beam])
    else:  # a sum over beams would say nothing of one of them
        count = None if beams > 1 else one("num_output_tokens")
    reason = one("finish_reason")
    texts = values.get("text_output", [])
    cumulative = values.get("cum_log_probs") or values.get("cumulative_logprob") or []
    return Chunk(
        texts[beam] if beam < len(texts) else "", count, received_ns,
        index=int(one("sequence_index") or 0) * beams + beam,
        token_ids=tuple(row("output_ids")[:count]), finish_reason=str(reason) if reason else None,
        log_probs=tuple(row("output_log_probs")[:count]),
        cumulative_log_prob=cumulative[beam] if beam < len(cumulative) else None,
        input_token_count=one("num_input_tokens"),
        perf={name: value for name in _PERF if (value := one(name)) is not None},
    )  # fmt: skip
