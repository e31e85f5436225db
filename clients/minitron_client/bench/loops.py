"""The one loop that sends: open, by a schedule, or closed, each request as soon as another has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from minitron_client.bench.process import Pacer, no_pauses
from minitron_client.bench.record import Record
from minitron_client.bench.sender import Sender, SerializedRequest
from minitron_client.bench.watch import GoneWatch

#: (index, ns after the start or None in a closed loop, bytes).
Sendable = tuple[int, "int | None", SerializedRequest]


class SendLoop:
    """Sends requests of one event loop, and says of each when it has ended (``ended``), well or not.

    ``watch``: nothing more is sent once it has found the server gone. ``in_flight``: requests without an end so far.
    """

    def __init__(
        self, sender: Sender, *, ended: Callable[[Record], None], deadline_s: float | None = None,
        watch: GoneWatch | None = None,
    ) -> None:  # fmt: skip
        self.watch = watch or GoneWatch(sender)
        self.sent = self.in_flight = self.last_sent_ns = 0
        self._sender, self._ended, self._deadline_s = sender, ended, deadline_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def open(self, requests: Iterable[Sendable], start_ns: int) -> None:
        """Send every request at its time, whatever becomes of the others; return when all have ended."""
        await self._until_stopped(self._open(requests, start_ns))

    async def closed(self, requests: Iterable[Sendable], concurrency: int, end_ns: int | None = None) -> None:
        """Send so many at a time, each as soon as another has ended, none after ``end_ns``."""
        await self._until_stopped(self._closed(requests, concurrency, end_ns))

    def stop(self) -> None:
        """No more is sent; what is in flight is given up, and ends as Cancelled."""
        self._stopped.set()

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        sending, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            sending.cancel()
            for task in list(self._tasks):
                task.cancel()
        stopping.cancel()
        await asyncio.gather(sending, *self._tasks, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _open(self, requests: Iterable[Sendable], start_ns: int) -> None:
        pacer = Pacer()
        try:
            for index, at_ns, request in requests:
                intended_ns = start_ns + (at_ns or 0)
                await pacer.until(intended_ns)
                self._launch(Record(index, intended_ns), request)
            while self._tasks:
                await asyncio.wait(set(self._tasks))
        finally:
            pacer.close()

    async def _closed(self, requests: Iterable[Sendable], concurrency: int, end_ns: int | None) -> None:
        waiting = iter(requests)

        async def stream() -> None:
            while (end_ns is None or time.monotonic_ns() < end_ns) and (following := next(waiting, None)):
                index, _, request = following
                await self._launch(Record(index, time.monotonic_ns()), request)

        await asyncio.gather(*(stream() for _ in range(concurrency)))

    def _launch(self, record: Record, request: SerializedRequest) -> asyncio.Task[None]:
        self.sent += 1
        self.in_flight += 1
        task = asyncio.get_running_loop().create_task(self._one(record, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _one(self, record: Record, request: SerializedRequest) -> None:
        try:
            await self._sender.send(request, record, self._deadline_s)
        finally:
            self.last_sent_ns = max(self.last_sent_ns, record.sent_ns)
            self.in_flight -= 1
            self._ended(record)
        await self.watch.look_after(record)
        if self.watch.sure:
            self.stop()


async def closed_loop(
    sender: Sender, requests: Sequence[SerializedRequest], concurrency: int, deadline_s: float | None = None,
    watch: GoneWatch | None = None, *, first: int = 0,
) -> list[Record]:  # fmt: skip
    """Send all requests, ``concurrency`` at a time, undisturbed; their records in order.

    ``first``: index of the first request.
    """
    records: list[Record] = []
    loop = SendLoop(sender, ended=records.append, deadline_s=deadline_s, watch=watch)
    with no_pauses():
        await loop.closed(((index, None, one) for index, one in enumerate(requests, first)), concurrency)
    return sorted((record for record in records if record.sent_ns), key=lambda record: record.index)
