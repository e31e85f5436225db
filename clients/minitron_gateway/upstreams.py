"""Several servers as one engine: the one with the fewest outstanding tokens answers, and another where it cannot.

A server that is not ready is left out and asked again every second. A request whose first token has not come is sent
once more, to another server; never after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from minitron.errors import InvalidRequest, NotReady
from minitron.text.engine import Address, EngineClient, EngineError, EngineUnreachable
from minitron.text.tensors import Arrays, Tensors
from minitron_gateway.metrics import Metrics
from minitron_gateway.problems import kind_of

log = logging.getLogger(__name__)

_ASK_EVERY_S = 1.0
_ASK_TIMEOUT_S = 2.0


@dataclass(eq=False)
class _Upstream:
    """A server: whether it takes requests, and the tokens that it still has to read and make for ours."""

    url: str
    engine: EngineClient
    ready: bool = False
    outstanding: int = 0
    last_chosen: int = 0


class Upstreams:
    """To be made and used in one event loop."""

    def __init__(self, model: str, addresses: Sequence[Address], metrics: Metrics) -> None:
        """``model``: the engine's name on every server. Raises ValueError for files that cannot be read."""
        self._all = [
            _Upstream(one.url, EngineClient(model, one, hint="--upstream says where a server listens"))
            for one in addresses
        ]
        self._metrics, self._chosen = metrics, 0
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether any server takes requests."""
        return any(one.ready for one in self._all)

    async def open(self) -> None:
        """Ask every server once, and from then on every second."""
        await asyncio.gather(*(self._ask(one) for one in self._all))
        self._watchers = [asyncio.create_task(self._watch(one)) for one in self._all]

    async def close(self) -> None:
        """Wait for the end of what was stopped, and close the connections."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*(one.engine.close() for one in self._all))

    async def batches(
        self, inputs: Arrays, outputs: Sequence[str], request_id: str
    ) -> AsyncGenerator[list[Tensors], None]:
        """See EngineClient."""
        tried: _Upstream | None = None
        error: EngineError = EngineUnreachable("no server is ready")
        for is_last in (False, True):
            upstream = self._choose(tried)
            if upstream is None:
                raise error
            if is_last:
                self._metrics.retries.inc()
            try:
                async with contextlib.aclosing(self._ask_one(upstream, inputs, outputs, request_id)) as batches:
                    async for batch in batches:
                        yield batch
                return
            except _BeforeFirst as failed:
                if is_last or kind_of(failed.error) is InvalidRequest:
                    raise failed.error from None
                tried, error = upstream, failed.error

    async def _ask_one(
        self, upstream: _Upstream, inputs: Arrays, outputs: Sequence[str], request_id: str
    ) -> AsyncGenerator[list[Tensors], None]:
        begun = False
        with _outstanding(upstream, inputs) as made:
            try:
                async with contextlib.aclosing(upstream.engine.batches(inputs, outputs, request_id)) as batches:
                    async for batch in batches:
                        begun = True
                        made(sum(int(one["sequence_length"].sum()) for one in batch if "sequence_length" in one))
                        yield batch
            except EngineError as error:
                if kind_of(error) is NotReady:
                    self._set(upstream, ready=False)
                if begun:
                    raise
                raise _BeforeFirst(error) from error

    def _choose(self, without: _Upstream | None) -> _Upstream | None:
        """The ready one with the least to do, among equals the one that was longest not chosen."""
        ready = [one for one in self._all if one.ready and one is not without]
        if not ready:
            return None
        chosen = min(ready, key=lambda one: (one.outstanding, one.last_chosen))
        self._chosen += 1
        chosen.last_chosen = self._chosen
        return chosen

    async def _watch(self, upstream: _Upstream) -> None:
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            await self._ask(upstream)

    async def _ask(self, upstream: _Upstream) -> None:
        self._set(upstream, ready=await upstream.engine.is_ready(_ASK_TIMEOUT_S))

    def _set(self, upstream: _Upstream, *, ready: bool) -> None:
        if ready is not upstream.ready:
            log.info("%s is %s", upstream.url, "ready" if ready else "not ready, and left out until it is")
        upstream.ready = ready
        self._metrics.upstream_ready.labels(upstream.url).set(int(ready))


class _BeforeFirst(Exception):
    """A request that failed before anything came."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _outstanding(upstream: _Upstream, inputs: Arrays) -> Iterator[_Left]:
    """Count a request among the upstream's tokens, less and less as they are made."""
    left = _Left(upstream, int(inputs["input_lengths"].sum() + inputs["request_output_len"].sum()))
    try:
        yield left
    finally:
        upstream.outstanding -= left.tokens


class _Left:
    """The tokens that a request has left; called with the number of those that were made."""

    def __init__(self, upstream: _Upstream, tokens: int) -> None:
        self._upstream, self.tokens = upstream, tokens
        upstream.outstanding += tokens

    def __call__(self, made: int) -> None:
        made = min(made, self.tokens)
        self.tokens -= made
        self._upstream.outstanding -= made
