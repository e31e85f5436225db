"""Several servers as one engine: the one with the fewest outstanding tokens answers, and another where it cannot.

A server that is not ready is left out and asked again every second; one that is ready and does not answer the question
in time is left out at the third time. Names are looked up every other second: a server that a name no longer stands
for is asked nothing new, and left when its last request has ended. A request whose first token has not come is sent
once more, to another server; never after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from minitron.errors import InvalidRequest, NotReady
from minitron.text.engine import Address, EngineCallError, EngineClient, EngineUnreachable
from minitron.text.tensors import Arrays, Tensors
from minitron_gateway.metrics import Metrics
from minitron_gateway.names import Names
from minitron_gateway.problems import kind_of, lost

log = logging.getLogger(__name__)

_ASK_EVERY_S = 1.0
_ASK_TIMEOUT_S = 2.0
_SILENT_TIMES = 3
_LOOK_UP_EVERY_S = 2.0


@dataclass(eq=False)
class _Upstream:
    """A server: whether it takes requests, and the tokens that it still has to read and make for ours."""

    url: str
    engine: EngineClient
    ready: bool = False
    silent: int = 0
    outstanding: int = 0
    requests: int = 0
    last_chosen: int = 0
    watcher: asyncio.Task[None] | None = None


def _flag_of(field: str) -> str:
    """How a gateway is told that field of an upstream's Address."""
    return "--upstream" if field == "url" else f"--upstream-{field.replace('_', '-')}"


class Upstreams:
    """To be made and used in one event loop."""

    def __init__(self, model: str, addresses: Sequence[Address], metrics: Metrics) -> None:
        """``model``: the engine's name on every server."""
        self._model, self._names = model, Names(addresses)
        self._all: list[_Upstream] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._metrics, self._chosen = metrics, 0
        self._looking: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether any server takes requests."""
        return any(one.ready for one in self._all)

    async def open(self) -> None:
        """Ask every server once, and from then on every second. Raises ValueError for files that cannot be read."""
        await self._look_up()
        if self._names.any:
            self._looking = asyncio.create_task(self._look_up_again())

    async def close(self) -> None:
        """Wait for the end of what was stopped, and close the connections."""
        for task in (self._looking, *self._leaving, *(one.watcher for one in self._all)):
            if task:
                task.cancel()
        await asyncio.gather(*(one.engine.close() for one in self._all))

    async def _look_up_again(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_UP_EVERY_S)
            await self._look_up()

    async def _look_up(self) -> None:
        """Take on the servers that the names stand for now, and leave those that they no longer do."""
        now = {one.url: one for one in await self._names.look_up()}
        for gone in [one for one in self._all if one.url not in now]:
            self._all.remove(gone)
            self._leaving.add(task := asyncio.create_task(self._leave(gone)))
            task.add_done_callback(self._leaving.discard)
        known = {one.url for one in self._all}
        new = [
            _Upstream(url, EngineClient(self._model, one, named=_flag_of))
            for url, one in now.items()
            if url not in known
        ]
        self._all += new
        await asyncio.gather(*(self._ask(one) for one in new))
        for one in new:
            one.watcher = asyncio.create_task(self._watch(one))

    async def _leave(self, upstream: _Upstream) -> None:
        """Let its requests end, and close the connection."""
        log.info("%s is no longer among the servers; it ends what it has", upstream.url)
        if upstream.watcher:
            upstream.watcher.cancel()
        self._metrics.forget_upstream(upstream.url)
        while upstream.requests:
            await asyncio.sleep(_ASK_EVERY_S)
        await upstream.engine.close()

    async def batches(
        self, inputs: Arrays, outputs: Sequence[str], request_id: str
    ) -> AsyncGenerator[list[Tensors], None]:
        """See EngineClient; raises Problem where the server is lost in the middle."""
        timing = self._metrics.timing()
        try:
            async with contextlib.aclosing(self._retried(inputs, outputs, request_id)) as batches:
                async for batch in batches:
                    timing.came(sum(int(one["sequence_length"].sum()) for one in batch if "sequence_length" in one))
                    yield batch
        finally:
            timing.end()

    async def _retried(
        self, inputs: Arrays, outputs: Sequence[str], request_id: str
    ) -> AsyncGenerator[list[Tensors], None]:
        """The same, unmeasured: from one server, and where nothing came from it from another."""
        tried: _Upstream | None = None
        error: EngineCallError = EngineUnreachable("no server is ready")
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
            except EngineCallError as error:
                kind = kind_of(error)
                self._metrics.upstream_errors.labels(upstream.url, kind.__name__).inc()
                if kind is NotReady:
                    self._set(upstream, ready=False)
                if begun:
                    raise (lost() if kind is NotReady else error) from None
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
        """A server that says no, or is not there, is left out at once; one that is only slow to say may be busy."""
        said = await upstream.engine.is_ready(_ASK_TIMEOUT_S)
        upstream.silent = upstream.silent + 1 if said is None else 0
        if said is not None or upstream.silent >= _SILENT_TIMES:
            self._set(upstream, ready=bool(said))

    def _set(self, upstream: _Upstream, *, ready: bool) -> None:
        if ready is not upstream.ready:
            log.info("%s is %s", upstream.url, "ready" if ready else "not ready, and left out until it is")
        upstream.ready = ready
        if upstream in self._all:  # else it is forgotten, and only ends what it has
            self._metrics.upstream_ready.labels(upstream.url).set(int(ready))


class _BeforeFirst(Exception):
    """A request that failed before anything came."""

    def __init__(self, error: EngineCallError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _outstanding(upstream: _Upstream, inputs: Arrays) -> Iterator[_Left]:
    """Count a request among the upstream's tokens, less and less as they are made."""
    left = _Left(upstream, int(inputs["input_lengths"].sum() + inputs["request_output_len"].sum()))
    upstream.requests += 1
    try:
        yield left
    finally:
        upstream.outstanding -= left.tokens
        upstream.requests -= 1


class _Left:
    """The tokens that a request has left; called with the number of those that were made."""

    def __init__(self, upstream: _Upstream, tokens: int) -> None:
        self._upstream, self.tokens = upstream, tokens
        upstream.outstanding += tokens

    def __call__(self, made: int) -> None:
        made = min(made, self.tokens)
        self.tokens -= made
        self._upstream.outstanding -= made
