"""The endpoints of one worker, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from minitron import tracing
from minitron.text.engine import EngineCallError
from minitron.text.errors import RequestError
from minitron.text.pace import Pace
from minitron.text.prompts import PromptMaker
from minitron.text.service import TextService
from minitron.text.tokenizer import TextTokenizer
from minitron_gateway import metrics, openapi, problems, spans
from minitron_gateway.bodies import ChatBody, CompletionBody
from minitron_gateway.generation import Generation, of_chat, of_completion
from minitron_gateway.problems import Problem
from minitron_gateway.settings import Settings
from minitron_gateway.shapes import event
from minitron_gateway.upstreams import Upstreams

log = logging.getLogger(__name__)

_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_COMMENT = b": keep-alive\n\n"
_LOOK_EVERY_S = 0.02
_TOKENIZER_FLAGS = ("add_special_tokens", "skip_special_tokens")


class Gateway:
    """Everything behind the endpoints; ``open`` and ``close`` in the event loop that serves it."""

    def __init__(self, settings: Settings) -> None:
        """Loads the tokenizer."""
        self.settings, self.metrics = settings, metrics.Metrics()
        flags = {name: settings.parameters.get(name, "true") in ("true", "1") for name in _TOKENIZER_FLAGS}
        self.tokenizer = TextTokenizer(settings.tokenizer, **flags, chats=True)
        self.prompts = PromptMaker(self.tokenizer, settings.parameters)
        self.is_draining, self._accepted, self._streams = False, 0, 0
        self.working: set[asyncio.Task[None]] = set()
        self._started = int(time.time())

    async def open(self) -> None:
        """Find the servers; raises ValueError for files that cannot be read."""
        name = self.settings.parameters["tensorrt_llm_model_name"]
        self.upstreams = Upstreams(name, self.settings.upstreams, self.metrics)
        await self.upstreams.open()
        self.text = TextService(self.tokenizer, self.prompts, self.upstreams, (), excludes_input=True)
        self.pace = Pace()

    async def close(self) -> None:
        """Leave the servers in good order."""
        self.pace.stop()
        await self.upstreams.close()

    async def drain(self) -> None:
        """Take nothing new, and wait for what was accepted; what outlives ``drain_s`` is ended."""
        self.is_draining = True
        until = time.monotonic() + self.settings.drain_s
        while self._accepted and time.monotonic() < until:
            await asyncio.sleep(_LOOK_EVERY_S)
        for task in self.working:
            task.cancel()

    @contextlib.contextmanager
    def accepting(self) -> Iterator[None]:
        """Accept a request, which a drain then waits for; raises Problem while one is on."""
        if self.is_draining:
            raise Problem(503, "the gateway is stopping")
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    @contextlib.contextmanager
    def room(self, sequences: int) -> Iterator[None]:
        """Count sequences among those in flight; raises Problem where they would be too many."""
        most = self.settings.limits.streams
        if self._streams + max(sequences, 1) > most:
            raise Problem(429, f"{self._streams} sequences are in flight, and at most {most} may be; try again later")
        self._count(sequences)
        try:
            yield
        finally:
            self._count(-sequences)

    def _count(self, sequences: int) -> None:
        self._streams += sequences
        self.metrics.streams.inc(sequences)

    def check_key(self, request: Request) -> None:
        """Whether the request shows a key, where one is needed; raises Problem."""
        if not self.settings.keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        if scheme.lower() != "bearer" or digest not in self.settings.keys:
            raise Problem(401, "the request shows no valid key: send 'Authorization: Bearer KEY'")

    def check_model(self, name: str) -> None:
        """Whether a model is served under this name; raises Problem."""
        if name != self.settings.model:
            message = f"the model {name[:100]!r} does not exist; {self.settings.model!r} does"
            raise Problem(404, message, param="model", code="model_not_found")

    async def completion(self, raw: bytes) -> Generation:
        """``/v1/completions``."""
        body = CompletionBody.model_validate_json(raw)
        self.check_model(body.model)
        return await of_completion(body, self.tokenizer, self.prompts, self.settings.limits.sequences)

    async def chat(self, raw: bytes) -> Generation:
        """``/v1/chat/completions``."""
        body = ChatBody.model_validate_json(raw)
        self.check_model(body.model)
        return await of_chat(body, self.tokenizer, self.prompts, self.settings.limits.sequences)

    async def models(self, request: Request) -> Response:
        """``/v1/models``."""
        self.check_key(request)
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        most = int(self.settings.parameters["max_seq_len"])
        return {"id": self.settings.model, "object": "model", "created": self._started, "owned_by": "minitron",
                "max_model_len": most}  # fmt: skip

    async def health(self, request: Request) -> Response:
        """``/health``: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``/health/ready``: a request would be taken, and some server would answer it."""
        if self.is_draining:
            return _json({"ready": False, "reason": "draining"}, 503)
        if not self.upstreams.ready:
            return _json({"ready": False, "reason": "no upstream is ready"}, 503)
        return _json({"ready": True})

    async def counters(self, request: Request) -> Response:
        """``/metrics``."""
        return Response(self.metrics.text(), media_type=metrics.CONTENT_TYPE)


def application(gateway: Gateway) -> Starlette:
    """The routes."""
    document = openapi.document(gateway.settings.model, keyed=bool(gateway.settings.keys))

    async def described(request: Request) -> Response:
        return _json(document)

    routes = [
        Route("/v1/completions", _Endpoint(gateway, "completions", gateway.completion), methods=["POST"]),
        Route("/v1/chat/completions", _Endpoint(gateway, "chat", gateway.chat), methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.model),
        Route("/health", gateway.health),
        Route("/health/ready", gateway.ready),
        Route("/metrics", gateway.counters),
        Route("/openapi.json", described),
    ]
    return Starlette(routes=routes, exception_handlers={Problem: _refused, HTTPException: _not_found})


class _Endpoint:
    """An endpoint that generates: ``read`` makes a Generation of a body."""

    def __init__(self, gateway: Gateway, name: str, read: Callable[[bytes], Awaitable[Generation]]) -> None:
        self._gateway, self._name, self._read = gateway, name, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, to its end or until its client leaves."""
        reply, counted, began = _Reply(send), self._gateway.metrics, time.perf_counter()
        span = spans.begin(request := Request(scope), self._name)
        try:
            self._gateway.check_key(request)
            with self._gateway.accepting():
                await self._generate(request, receive, reply, span)
                counted.duration.labels(self._name).observe(time.perf_counter() - began)
        except _Left:
            counted.left.inc()
            reply.status = reply.status or 499
            span.set({"error.type": spans.LEFT})
        except Exception as error:
            if reply.status:
                counted.broken.inc()
            spans.failed(span, problem := _problem(error), broken=bool(reply.status))
            await reply.fail(problem)
        finally:
            span.set({"http.response.status_code": reply.status or None})
            span.end()
        counted.requests.labels(self._name, str(reply.status)).inc()

    async def _generate(self, request: Request, receive: Receive, reply: _Reply, span: tracing.Span) -> None:
        gateway, counted, began = self._gateway, self._gateway.metrics, time.perf_counter()
        with gateway.room(0):  # before a body is read for nothing
            pass
        generation = await self._read(await _body(request, receive, gateway.settings.limits.body_bytes))
        spans.asked(span, generation, gateway.settings.model)
        generation.on_first = lambda: spans.first_token(span, time.perf_counter() - began)
        with gateway.room(generation.count):
            counted.prompt_tokens.inc(generation.prompt_tokens)
            try:
                await self._while_there(self._answer(reply, generation), receive)
            finally:
                counted.completion_tokens.inc(generation.tokens)
                spans.answered(span, generation)

    async def _answer(self, reply: _Reply, generation: Generation) -> None:
        gateway = self._gateway
        if not generation.streams:
            await reply.whole(200, await generation.whole(gateway.text))
            return
        began, is_first = time.perf_counter(), True
        events = generation.events(gateway.text, gateway.settings.interval, gateway.pace)
        async with contextlib.aclosing(events), reply.kept_alive(gateway.settings.keep_alive_s):
            async for one in events:
                if is_first:
                    gateway.metrics.first_event.observe(time.perf_counter() - began)
                    is_first = False
                await reply.event(one)
        await reply.end()

    async def _while_there(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Do the work while the client is there; raises _Left, with the work undone, as soon as it is not."""
        task, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
        self._gateway.working.add(task)
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Left
            if task.cancelled():
                raise Problem(503, "the gateway stopped before the end")
            task.result()
        finally:
            self._gateway.working.discard(task)
            leaving.cancel()
            task.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)


class _Reply:
    """What has been sent of an answer; ``status`` 0: nothing."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0
        self._sent_s, self._turn = 0.0, asyncio.Lock()

    async def whole(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """An answer in one piece."""
        self.status = status
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, data: bytes) -> None:
        """An event of a stream; waits while the client is slow to read."""
        async with self._turn:
            if not self.status:
                await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                self.status = 200
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_s = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """Meanwhile send a comment whenever nothing was sent for ``every_s`` (0: none).

        Clients pass over it (HTML's "Server-sent events": a line that begins with a colon), and balancers, most of
        which close a connection without a byte after a minute, see that this one lives.
        """
        beating = asyncio.create_task(self._beat(every_s)) if every_s else None
        try:
            yield
        finally:
            if beating:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._sent_s = loop.time()
        while True:
            silent_s = loop.time() - self._sent_s
            if silent_s < every_s:
                await asyncio.sleep(every_s - silent_s)
            elif self._turn.locked():  # it is the client that lets us wait
                await asyncio.sleep(every_s)
            else:
                await self.event(_COMMENT)

    async def end(self) -> None:
        """The end of a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, problem: Problem) -> None:
        """An error: the whole answer, or the last event of a stream that has begun."""
        if not self.status:
            await self.whole(problem.status, problem.body(), *problem.headers())
            return
        await self.event(event(problem.body(), "error"))
        await self.end()


class _Left(Exception):
    """The client has left."""


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, receive: Receive, most: int) -> bytes:
    """The request's body; raises Problem for one of more than ``most`` bytes, and _Left."""
    told = request.headers.get("content-length", "0")
    too_large = Problem(413, f"the body has more than the {most} bytes that the gateway takes")
    if told.isascii() and told.isdigit() and int(told[:20]) > most:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Left
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        if not message.get("more_body"):
            return b"".join(parts)


def _problem(error: Exception) -> Problem:
    """What a client is told about an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ValidationError):
        return problems.of_validation(error)
    if isinstance(error, RequestError):
        return problems.of_request(error)
    if isinstance(error, EngineCallError):
        return problems.of_engine(error)
    log.error("a request failed in the gateway: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))
    return Problem(500, f"the gateway failed ({type(error).__name__})")


async def _refused(request: Request, error: Exception) -> Response:
    problem = _problem(error)
    headers = {name.decode(): value.decode() for name, value in problem.headers()}
    return Response(problem.body(), problem.status, headers, media_type="application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "there is no such path" if error.status_code == 404 else str(error.detail)
    problem = Problem(error.status_code, f"{request.method} {request.url.path[:200]}: {what}; see /openapi.json")
    return Response(problem.body(), problem.status, error.headers, media_type="application/json")


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document).encode(), status, media_type="application/json")
