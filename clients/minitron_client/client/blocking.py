"""The client for scripts and threads: calls block until their answer is there."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from minitron import failures
from minitron.errors import ClientError, DeadlineExceeded, NotReady
from minitron.text.channel import PATIENT_KEEPALIVE_S
from minitron_client.client import dialect, questions
from minitron_client.client.answer import STOP_GRACE_S, Chunk, Exchange, Response
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import DEFAULT_URL, INFER_RPC, ApiKey, Deadline, Endpoint, Retry, Tls
from minitron_client.client.questions import Question
from minitron_client.client.request import Request, as_request

log = logging.getLogger(__name__)


class Client:
    """A connection to one server; any number of threads may use it at once. Use it in a ``with`` block, or close it.

    ``model``: the model that takes the requests; None finds tensorrt_llm_bls, else ensemble, else tensorrt_llm.
    ``deadline_s``: for each request unless it says otherwise, retries included; None waits for ever.
    ``keepalive_s``: how often a silent server is asked whether it lives (see ``Endpoint``). ``url`` may be an Endpoint,
    which says how to connect by itself.
    ``tokenizer``: the served tokenizer's folder; text is then made here, over tensorrt_llm, without the text model.

    Every method that talks to the server may raise a ClientError: NotReady, Rejected, InvalidRequest,
    DeadlineExceeded, StreamBroken, Cancelled.
    """

    def __init__(
        self,
        url: str | Endpoint = DEFAULT_URL,
        *,
        model: str | None = None,
        tls: Tls | None = None,
        api_key: ApiKey | None = None,
        deadline_s: float | None = None,
        retry: Retry | None = None,
        keepalive_s: float = PATIENT_KEEPALIVE_S,
        tokenizer: Path | str | None = None,
    ) -> None:
        self._endpoint = Endpoint.of(url, tls, api_key, keepalive_s)
        self._model, self._deadline_s, self._retry = model, deadline_s, retry or Retry()
        self._tokenizer = None if tokenizer is None else Path(tokenizer)
        self._metadata = self._endpoint.metadata
        self._channel = self._endpoint.channel()
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_stream(
            INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        self._models: dict[str | None, ServedModel] = {}
        self._finding = threading.RLock()  # again where a stream that is collected meanwhile is stopped
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that is in flight and close the connection."""
        for stream in list(self._streams):
            stream.close()
        self._channel.close()

    def generate(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Response:
        """Wait for the whole answer to a prompt (``options``: fields of Request) or a Request."""
        with self._open(asked, options, model, deadline_s, stream=False) as stream:
            for _ in stream:
                pass
            return stream.response

    def stream(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Stream:
        """Send a prompt or a Request and iterate over the chunks of its answer; leaving the iterator cancels it."""
        return self._open(asked, options, model, deadline_s, stream=True)

    def generate_batch(
        self,
        asked: Sequence[str | Request],
        *,
        concurrency: int = 16,
        model: str | None = None,
        deadline_s: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Whole answers to many prompts, in their order, ``concurrency`` at once; the first failure is raised."""
        with ThreadPoolExecutor(max(1, min(concurrency, len(asked)))) as pool:
            waiting = [pool.submit(self.generate, one, model=model, deadline_s=deadline_s, **options) for one in asked]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def stop(self, request_id: str, *, model: str = "tensorrt_llm") -> None:
        """Tell a model to end its request of this id; an unknown id is no error."""
        message = dialect.stop_message(self.served_model(model, deadline_s=STOP_GRACE_S), request_id)
        try:
            answers = list(self._infer(message, timeout=STOP_GRACE_S, metadata=self._metadata))
            if error_message := next((answer.error_message for answer in answers if answer.error_message), None):
                raise failures.of_text(error_message, self._endpoint.url)
        except grpc.RpcError as error:
            raise failures.of_status(error, self._endpoint.url) from None

    def is_live(self) -> bool:
        """Whether a server answers there."""
        return self._yes(questions.live())

    def is_ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return self._yes(questions.ready())

    def is_model_ready(self, name: str) -> bool:
        """Whether one model is ready."""
        return self._yes(questions.model_ready(name))

    def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return dict(self._ask(questions.metadata()))

    def model_metadata(self, model: str | None = None) -> dict[str, Any]:
        """Versions, inputs and outputs of a model."""
        return dict(self._ask(questions.model_metadata(model or self.served_model().name)))

    def config(self, model: str | None = None) -> dict[str, Any]:
        """A model's config as the server completed it."""
        return dict(self._ask(questions.config(model or self.served_model().name)))

    def statistics(self, model: str | None = None) -> list[dict[str, Any]]:
        """Counts and durations of a model, for each version."""
        return list(self._ask(questions.statistics(model or self.served_model().name)))

    def served_model(self, name: str | None = None, *, deadline_s: float | None = None) -> ServedModel:
        """What the client knows of a model (None: the one that takes the requests): its dialect and its inputs."""
        return self._served_model(name, Deadline(deadline_s))

    def _served_model(self, name: str | None, deadline: Deadline) -> ServedModel:
        name = name or self._model
        with self._finding:  # threads that begin together: a tokenizer is loaded once, and not while it is loaded
            if name not in self._models:
                steps = questions.find_model(name, self._endpoint.url, self._tokenizer)
                found = self._follow(steps, deadline)
                self._models[name] = self._models[found.name] = found
            return self._models[name]

    def _follow(self, steps: Generator[Question, Any, ServedModel], deadline: Deadline) -> ServedModel:
        answer = None
        while True:
            try:
                question = steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = self._ask(question, deadline)

    def _ask(self, question: Question, deadline: Deadline | None = None) -> Any:
        timeout = (deadline or Deadline(None)).question_s
        try:
            call = getattr(self._stub, question.rpc)
            return question.read(call(question.message, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise failures.of_status(error, self._endpoint.url) from None

    def _yes(self, question: Question) -> bool:
        try:
            return bool(self._ask(question))
        except (NotReady, DeadlineExceeded):
            return False

    def _open(
        self,
        asked: str | Request,
        options: dict[str, Any],
        model: str | None,
        deadline_s: float | None,
        *,
        stream: bool,
    ) -> Stream:
        deadline = Deadline(self._deadline_s if deadline_s is None else deadline_s)
        request = as_request(asked, options)
        request.check()
        served = self._served_model(model, deadline)
        exchange = Exchange(served, request, self._endpoint.url, stream=stream, deadline=deadline, retry=self._retry)
        return Stream(self, exchange)


class Stream(Iterator[Chunk]):
    """The chunks of one answer as they come. Leaving it (``break``, the end of its block) cancels the request."""

    def __init__(self, client: Client, exchange: Exchange) -> None:
        self._client, self._exchange = client, exchange
        self._ready: deque[Chunk] = deque()
        self._ended = self._reading = False
        self._timer: threading.Timer | None = None
        client._streams.add(self)
        left_s = exchange.deadline.left_s
        if exchange.model.takes_stops and left_s is not None:
            self._timer = threading.Timer(left_s, self._expire)
            self._timer.daemon = True
            self._timer.start()
        self._send()

    @property
    def request_id(self) -> str:
        """The id under which the server knows the request."""
        return self._exchange.request_id

    @property
    def response(self) -> Response:
        """The answer as far as it has come; whole once the iteration has ended."""
        return self._exchange.response()

    def __next__(self) -> Chunk:
        while not self._ready:
            if self._ended:
                raise StopIteration
            self._receive()
        return self._ready.popleft()

    def cancel(self) -> None:
        """End the request from any thread; whoever iterates gets Cancelled."""
        if not self._ended and not self._exchange.final:
            self._exchange.stopped = True
            self._stop()

    def close(self) -> None:
        """End the request, if it has not ended, and release what it holds."""
        if not self._ended:
            self.cancel()
            if not self._reading:  # else the thread that reads ends it, with Cancelled
                self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self.close()

    def _send(self) -> None:
        self._exchange.sending()
        self._call = self._client._infer(
            self._exchange.message, timeout=self._exchange.call_timeout_s, metadata=self._client._metadata
        )

    def _receive(self) -> None:
        try:
            self._ready.extend(self._exchange.take(self._read()))
            if self._exchange.leaves_engine:
                self._stop()
                self._end()
        except StopIteration:
            self._end()
            self._exchange.check_whole()
        except grpc.RpcError as error:
            self._send_again_or_raise(self._exchange.failure(error))
        except ClientError as error:
            self._send_again_or_raise(error)

    def _read(self) -> Any:
        self._reading = True
        try:
            return next(self._call)
        finally:
            self._reading = False

    def _send_again_or_raise(self, error: ClientError) -> None:
        if isinstance(error, NotReady):
            self._client._models.clear()  # it may come back with other models
        delay_s = self._exchange.retry_delay_s(error)
        if delay_s is None:
            self._end()
            raise error from None
        log.debug("sending request %s again in %.1f s: %s", self.request_id, delay_s, error)
        self._finish()
        time.sleep(delay_s)
        self._send()

    def _expire(self) -> None:
        self._exchange.expired = True
        self._stop()

    def _stop(self) -> None:
        """End the generation in the server: with a ``stop``, or by cancelling the stream where nothing takes that."""
        if not self._exchange.model.takes_stops:
            self._call.cancel()
            return
        with contextlib.suppress(ClientError, ValueError):  # the server, or our channel, is gone: nothing to stop
            self._client.stop(self.request_id, model=self._exchange.model.name)

    def _end(self) -> None:
        self._ended = True
        if self._timer:
            self._timer.cancel()
        self._finish()

    def _finish(self) -> None:
        """Let the call come to its end, for a while, whatever its answer was: a stop, an error, a whole one.

        One that is cancelled while its last response is written stays in Triton (2.51) for ever, and with it the model.
        """
        if not self._call.is_active():
            return
        watch = threading.Timer(STOP_GRACE_S, self._call.cancel)
        watch.daemon = True
        watch.start()
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass
        watch.cancel()
