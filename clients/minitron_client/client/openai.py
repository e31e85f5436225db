"""OpenAI's HTTP API asked as the gRPC server is: the same Request, Chunks, Response and errors.

``/v1/completions`` of the gateway here, or of any server that has it (platform.openai.com/docs/api-reference). Tokens
are counted by the server: in each event of a stream where it knows ``continuous_usage_stats``, as vLLM and the gateway
do. A request that does not say how to sample takes the likeliest token, as in TensorRT-LLM; OpenAI's default samples.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minitron import extras, failures, tracing
from minitron.errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    MissingDependency,
    NotReady,
    Rejected,
    StreamBroken,
    UsageError,
)
from minitron.text import proxy
from minitron.text.trace_context import Headers
from minitron_client.client import spans
from minitron_client.client.answer import Chunk, Output, Response
from minitron_client.client.dialect import ServedModel
from minitron_client.client.endpoint import QUESTION_DEADLINE_S, ApiKey, Deadline, Endpoint, Tls
from minitron_client.client.request import Request, as_request
from minitron_client.client.timing import Timing

if TYPE_CHECKING:
    import aiohttp

DIALECT = "openai"
_NAMES = {
    "prompt": "prompt", "input_ids": "prompt", "max_tokens": "max_tokens", "min_tokens": "min_tokens",
    "ignore_end": "ignore_eos", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "seed": "seed",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "num_return_sequences": "n", "stop_words": "stop",
}  # fmt: skip
#: Fields of a request that say nothing about what is asked of the model.
_ABOUT_THE_CALL = ("return_log_probs", "return_perf_metrics", "request_id", "traceparent")
_STATUSES: Mapping[int, type[ClientError]] = {
    **dict.fromkeys((400, 401, 403, 404, 405, 413, 422), InvalidRequest), 429: Rejected, 503: NotReady,
}  # fmt: skip
_OF_PROXIES = (407, 502, 503, 504)  # statuses that a proxy in between may have given
_DONE = b"[DONE]"
_LONGEST_EVENT = 1 << 22  # bytes of a line; an event with the log probs of a long prompt is one


@dataclass(frozen=True)
class HttpEndpoint:
    """One server: ``url`` is where its API begins, such as http://127.0.0.1:8080/v1."""

    url: str
    tls: Tls | None = None
    api_key: ApiKey | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"{self.url!r} is no URL of an OpenAI API; give one such as http://127.0.0.1:8080/v1")
        if self.tls and not self.url.startswith("https://"):
            raise UsageError(f"{self.url} has no TLS; give https://")

    def session(self) -> aiohttp.ClientSession:
        """Connections of the running event loop, one for each request; raises InputError, MissingDependency."""
        try:
            import aiohttp
        except ImportError:
            raise MissingDependency(f"asking over HTTP needs the package aiohttp: {extras.advice('aiohttp')}") from None
        tls = (self.tls or Tls()).context() if self.url.startswith("https://") else False
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key.value}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls), headers=headers,
            timeout=aiohttp.ClientTimeout(total=None), read_bufsize=_LONGEST_EVENT,
            trust_env=_proxy(self.url)[0] is not None,
        )  # fmt: skip


AnyEndpoint = Endpoint | HttpEndpoint


def body(request: Request, model: str, *, stream: bool) -> bytes:
    """The body of ``/v1/completions`` that asks ``request``; raises InvalidRequest for what it has no parameter for."""
    request.check()
    asked: dict[str, Any] = {"model": model}
    plain = Request("-")
    for field, value in vars(request).items():
        if value == getattr(plain, field) and field not in ("prompt", "max_tokens"):
            continue
        if field in _NAMES:
            asked.update({} if value is None else {_NAMES[field]: list(value) if field == "input_ids" else value})
        elif field not in _ABOUT_THE_CALL:
            raise InvalidRequest(f"the request was not sent: OpenAI's API has no parameter for {field}")
    if request.temperature is None and request.top_k is None and request.top_p is None:
        asked["temperature"] = 0
    if request.return_log_probs:
        asked["logprobs"] = 0
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return json.dumps(asked).encode()


async def documents(
    session: aiohttp.ClientSession, url: str, asked: bytes, headers: Headers = ()
) -> AsyncGenerator[dict[str, Any], None]:
    """The documents that a body, sent with ``headers``, is answered with: a stream's events, or the whole one.

    Leaving the loop closes the connection, which ends the request. Raises ClientError.
    """
    import aiohttp

    begun = False
    try:
        async with session.post(f"{url}/completions", data=asked, headers=dict(headers)) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, await answer.read(), url)
            begun = True
            if answer.content_type != "text/event-stream":
                yield json.loads(await answer.read())
                return
            async for data, name in _events(answer.content):
                if data == _DONE:
                    return
                document = json.loads(data)
                if name == b"error" or "error" in document:
                    raise failures.of_text(_message(document), url)
                yield document
            raise StreamBroken(f"{url}: the stream ended before its last event; the answer is incomplete")
    except (aiohttp.ClientError, OSError) as error:
        raise _broken(error, url, begun=begun) from None
    except ValueError as error:
        raise StreamBroken(f"{url}: an answer cannot be read ({error})") from None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[bytes, bytes]]:
    """Data and name of server-sent events, one line of data each."""
    name = b""
    async for line in content:
        field, _, value = line.rstrip(b"\r\n").partition(b": ")
        if field == b"event":
            name = value
        elif field == b"data":
            yield value, name
            name = b""


def _refusal(status: int, raw: bytes, url: str) -> ClientError:
    kind = _STATUSES.get(status, ClientError)
    try:
        message = _message(json.loads(raw))
    except (ValueError, AttributeError):
        message = " ".join(raw.decode(errors="replace").split())[:200] or "no reason given"
    advice = proxy.advice(*_proxy(url)) if status in _OF_PROXIES else ""
    return kind(f"{url}: {message} (HTTP {status}){advice}")


def _message(document: Any) -> str:
    error = document.get("error", document)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _broken(error: Exception, url: str, *, begun: bool) -> ClientError:
    why = str(error) or type(error).__name__
    if begun:
        return StreamBroken(f"{url}: the connection ended ({why}); the answer is incomplete")
    advice = proxy.advice(*_proxy(url))
    return NotReady(f"{url}: nothing answers there ({why}); check that the gateway runs{advice}")


def _proxy(url: str) -> tuple[str | None, str]:
    """The variable of the environment that sends a URL to a proxy (never a loopback address), and its HOST:PORT."""
    parts = urlsplit(url)
    address = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    return proxy.of_http(address, kinds=(parts.scheme,)), address


class Counts:
    """Chunks from documents, with the tokens of each: the server's counts are those of a choice so far."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self.input_tokens: int | None = None

    def chunks(self, document: Mapping[str, Any], received_ns: int, *, stream: bool) -> list[Chunk]:
        """What a document brought, one chunk for each of its choices."""
        usage, choices = document.get("usage") or {}, document["choices"]
        if self.input_tokens is None:
            self.input_tokens = usage.get("prompt_tokens")
        return [self._chunk(one, usage if stream or len(choices) == 1 else {}, received_ns) for one in choices]

    def _chunk(self, choice: Mapping[str, Any], usage: Mapping[str, int], received_ns: int) -> Chunk:
        index, total = int(choice["index"]), usage.get("completion_tokens")
        count = None if total is None else total - self._known.get(index, 0)
        self._known[index] = total or 0
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        return Chunk(
            choice["text"], count, received_ns, index=index, finish_reason=choice.get("finish_reason"),
            log_probs=tuple(value for value in log_probs if value is not None), input_token_count=self.input_tokens,
        )  # fmt: skip


class AsyncHttpClient:
    """``AsyncClient`` over HTTP, as far as commands need it, for one event loop."""

    def __init__(self, endpoint: HttpEndpoint, *, model: str | None = None, deadline_s: float | None = None) -> None:
        self._endpoint, self._model, self._deadline_s = endpoint, model, deadline_s
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> AsyncHttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, and with them what is in flight."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.close()

    async def served_model(self, name: str | None = None) -> ServedModel:
        """The model that is named here or was before, or the first of those that are served; raises ClientError."""
        name = name or self._model or await self._first_model()
        return ServedModel(name, DIALECT, decoupled=True, batched=False, inputs={})

    async def metadata(self) -> dict[str, Any]:
        """What is known of the server: nothing."""
        return {}

    async def generate(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> Response:
        """Wait for the whole answer to a prompt (``options``: fields of Request) or a Request."""
        async with AsyncHttpStream(self, as_request(asked, options), model, deadline_s, stream=False) as stream:
            async for _ in stream:
                pass
            return stream.response

    def stream(
        self, asked: str | Request, *, model: str | None = None, deadline_s: float | None = None, **options: Any
    ) -> AsyncHttpStream:
        """Iterate over the chunks of the answer; it is sent when the iteration starts."""
        return AsyncHttpStream(self, as_request(asked, options), model, deadline_s, stream=True)

    async def _first_model(self) -> str:
        import aiohttp

        url = self._endpoint.url
        try:
            timeout = aiohttp.ClientTimeout(total=QUESTION_DEADLINE_S)
            async with self._session.get(f"{url}/models", timeout=timeout) as answer:
                raw = await answer.read()
                if answer.status != 200:
                    raise _refusal(answer.status, raw, url)
                return str(json.loads(raw)["data"][0]["id"])
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error, url, begun=False) from None
        except (ValueError, LookupError, TypeError):
            raise InvalidRequest(f"{url}/models names no model; is the URL that of an OpenAI API?") from None

    @property
    def _session(self) -> aiohttp.ClientSession:
        """The connections; made on first use, because they belong to the event loop that runs then."""
        if self._opened is None:
            self._opened = self._endpoint.session()
        return self._opened


class AsyncHttpStream(AsyncIterator[Chunk]):
    """The chunks of one answer as they come, and ``response`` with those so far; leaving its block ends the request."""

    def __init__(
        self, client: AsyncHttpClient, request: Request, model: str | None, deadline_s: float | None, *, stream: bool
    ) -> None:
        self._client, self._request, self._model, self._streams = client, request, model or "", stream
        self._deadline_s = client._deadline_s if deadline_s is None else deadline_s
        self._counts, self._chunks = Counts(), list[Chunk]()
        self._ready: deque[Chunk] = deque()
        self._documents: AsyncGenerator[dict[str, Any], None] | None = None
        self._reading: asyncio.Task[dict[str, Any]] | None = None
        self._cancelled = False
        self._span: tracing.Span | None = None
        self.request_id = request.request_id or uuid.uuid4().hex

    async def start(self) -> None:
        """Make the request; raises InvalidRequest, and ClientError where no model was named. It goes out when read."""
        if self._documents is None:
            self._deadline = Deadline(self._deadline_s)
            self._model = self._model or (await self._client.served_model()).name
            asked = body(self._request, self._model, stream=self._streams)
            url = self._client._endpoint.url
            self._span = spans.begin(self._request, self._model, url, stream=self._streams)
            self._sent_ns = time.monotonic_ns()
            self._documents = documents(self._client._session, url, asked, self._span.headers)

    async def __anext__(self) -> Chunk:
        await self.start()
        while not self._ready:
            try:
                document = await self._next()
            except BaseException as end:
                self._end_span(None if isinstance(end, StopAsyncIteration) else end)
                raise
            chunks = self._counts.chunks(document, time.monotonic_ns(), stream=self._streams)
            self._ready.extend(chunks)
            self._chunks += chunks
        return self._ready.popleft()

    def cancel(self) -> None:
        """End the request; whoever iterates gets Cancelled."""
        self._cancelled = True
        if self._reading is not None:
            self._reading.cancel()

    async def close(self) -> None:
        """End the request, where it has not ended."""
        if self._reading is not None and not self._reading.done():
            self.cancel()
            await asyncio.wait({self._reading})
        if self._documents is not None:
            await self._documents.aclose()
        self._end_span()

    def leave(self) -> None:
        """As ``close``, for code that cannot wait."""
        self.cancel()
        self._end_span()

    async def __aenter__(self) -> AsyncHttpStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def response(self) -> Response:
        """The answer as far as it has come."""
        indices = sorted({chunk.index for chunk in self._chunks}) or [0]
        times = tuple((chunk.received_ns, chunk.token_count) for chunk in self._chunks)
        return Response(
            self.request_id, self._model, tuple(map(self._output, indices)),
            self._counts.input_tokens, Timing(self._sent_ns, times, self._streams), {},
        )  # fmt: skip

    async def _next(self) -> dict[str, Any]:
        assert self._documents is not None
        url = self._client._endpoint.url
        if self._cancelled:
            raise Cancelled(f"{url}: the request was cancelled")
        self._reading = asyncio.ensure_future(anext(self._documents))
        try:
            return await asyncio.wait_for(self._reading, self._deadline.left_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"{url}: no complete answer within the deadline") from None
        except asyncio.CancelledError:
            if self._cancelled:  # by us, and not the caller's task
                raise Cancelled(f"{url}: the request was cancelled") from None
            raise

    def _end_span(self, error: BaseException | None = None) -> None:
        if self._span is not None and self._span.records:
            spans.end(self._span, self.response, error)

    def _output(self, index: int) -> Output:
        own = [chunk for chunk in self._chunks if chunk.index == index]
        counts = [chunk.token_count for chunk in own]
        return Output(
            "".join(chunk.text for chunk in own), (), None if None in counts else sum(count or 0 for count in counts),
            next((chunk.finish_reason for chunk in reversed(own) if chunk.finish_reason), None),
            tuple(value for chunk in own for value in chunk.log_probs), None,
        )  # fmt: skip
