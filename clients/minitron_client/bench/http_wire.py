"""The measuring client over HTTP: bodies made before the run, only counts and times taken from a stream's events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from minitron.errors import Cancelled, ClientError, DeadlineExceeded
from minitron_client.bench.record import OK, Record
from minitron_client.bench.wire import Prepared, fail
from minitron_client.client import openai
from minitron_client.client.openai import Counts, HttpEndpoint

_BETWEEN_QUESTIONS_S = 0.1


class HttpWire:
    """Connections to one server for one event loop, one for each request in flight. As ``Wire``."""

    def __init__(self, endpoint: HttpEndpoint) -> None:
        self._url = endpoint.url
        self._session = endpoint.session()

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def send(self, prepared: Prepared, record: Record, deadline_s: float | None = None) -> Record:
        """Send a request now and fill in its record; raises nothing but the cancellation of its own task."""
        record.max_tokens = prepared.max_tokens
        record.sent_ns = time.monotonic_ns()
        try:
            await asyncio.wait_for(self._receive(prepared.message, record), deadline_s)
            record.outcome = OK
        except asyncio.CancelledError:
            record.outcome, record.error = Cancelled.__name__, "the run ended"
            raise
        except asyncio.TimeoutError:
            fail(record, DeadlineExceeded(f"{self._url}: no complete answer within the deadline"))
        except ClientError as error:
            fail(record, error)
        finally:
            record.ended_ns = time.monotonic_ns()
        return record

    async def is_ready(self, within_s: float) -> bool:
        """Whether a server is there that takes requests, or becomes it ``within_s``."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if await self._answers(until - time.monotonic()):
                return True
            await asyncio.sleep(_BETWEEN_QUESTIONS_S)
        return False

    async def _answers(self, timeout_s: float) -> bool:
        """The gateway says itself whether it takes requests; of another server its list of models is enough."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=timeout_s)
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            for path in (self._url.removesuffix("/v1") + "/health/ready", f"{self._url}/models"):
                async with self._session.get(path, timeout=timeout) as answer:
                    if answer.status != 404:
                        return answer.status == 200
        return False

    async def _receive(self, message: bytes, record: Record) -> None:
        counts = Counts()
        async with contextlib.aclosing(openai.documents(self._session, self._url, message)) as documents:
            async for document in documents:
                self._take(document, counts, record, time.monotonic_ns())

    def _take(self, document: dict[str, Any], counts: Counts, record: Record, received_ns: int) -> None:
        chunks = counts.chunks(document, received_ns, stream=True)
        record.responses += [(received_ns, chunk.token_count) for chunk in chunks]
        record.input_tokens = counts.input_tokens
