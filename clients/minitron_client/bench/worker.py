"""A sending process: it gets its requests as bytes with their times, sends them, and writes each record as it ends.

It talks to the run over a pipe, in this order: it says ``ready``; it is told when to start; while it sends it reports
what happened every quarter of a second, and may be told to ``stop``; at the end, its own or the server's, it says when
it last sent and whether the server is gone, is told the window, and answers with the summary of its records.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minitron_client.bench.gone import GoneWatch
from minitron_client.bench.pacing import Pacer
from minitron_client.bench.pauses import no_pauses
from minitron_client.bench.profile import Slo
from minitron_client.bench.record import OK, Record
from minitron_client.bench.summary import Window, read_records, summarize
from minitron_client.bench.wire import Prepared, wire_to
from minitron_client.client.openai import AnyEndpoint

_REPORT_S = 0.25


@dataclass(frozen=True)
class Task:
    """What one worker does. ``requests``: (index, ns after the start or None in a closed loop, what is sent)."""

    endpoint: AnyEndpoint
    requests: list[tuple[int, int | None, Prepared]]
    concurrency: int
    duration_s: float
    deadline_s: float | None
    records: Path


@dataclass
class Progress:
    """What happened since the last report: ``tokens`` of requests that ended, ``ttft_ms`` of first tokens that came."""

    sent: int = 0
    ended: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)


def main(pipe: Connection, task: Task) -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the run tells us to stop
    last_sent_ns, watch = asyncio.run(_send_all(pipe, task))
    pipe.send(("done", (last_sent_ns, watch.suspected, watch.sure)))
    while (said := pipe.recv()) == "stop":
        pass  # it was on its way when there was nothing left to stop
    window, slo = said
    pipe.send(("summary", summarize(read_records(task.records), Window(*window), Slo(**slo)).state()))


async def _send_all(pipe: Connection, task: Task) -> tuple[int, GoneWatch]:
    worker = _Worker(pipe, task)
    pipe.send(("ready", None))
    start_ns = await asyncio.to_thread(pipe.recv)
    with no_pauses():
        return await worker.run(start_ns)


class _Worker:
    def __init__(self, pipe: Connection, task: Task) -> None:
        self._pipe, self._task, self._wire = pipe, task, wire_to(task.endpoint)
        self._watch, self._progress = GoneWatch(self._wire), Progress()
        self._unanswered = 0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._last_sent_ns = 0

    async def run(self, start_ns: int) -> tuple[int, GoneWatch]:
        reporting = asyncio.ensure_future(self._report())
        with self._task.records.open("w", buffering=1, encoding="utf-8") as self._file:
            closed = bool(self._task.requests) and self._task.requests[0][1] is None
            sending = asyncio.ensure_future((self._closed if closed else self._open)(start_ns))
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():  # to be stopped: no more is sent, what is in flight is given up and recorded as such
                sending.cancel()
                for task in list(self._in_flight):
                    task.cancel()
            stopping.cancel()
            await asyncio.gather(sending, *self._in_flight, return_exceptions=True)
            if not sending.cancelled():
                sending.result()
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        self._tell()
        await self._wire.close()
        return self._last_sent_ns, self._watch

    async def _open(self, start_ns: int) -> None:
        """Every request at its time, whatever became of the others."""
        pacer = Pacer()
        try:
            for index, at_ns, prepared in self._task.requests:
                intended_ns = start_ns + (at_ns or 0)
                await pacer.until(intended_ns)
                self._launch(Record(index, intended_ns), prepared)
            while self._in_flight:
                await asyncio.wait(set(self._in_flight))
        finally:
            pacer.close()

    async def _closed(self, start_ns: int) -> None:
        """As many as there are streams, each as soon as another has ended, until the time is over."""
        await asyncio.sleep(max(start_ns - time.monotonic_ns(), 0) / 1e9)
        waiting = iter(self._task.requests)
        end_ns = start_ns + round(self._task.duration_s * 1e9)

        def next_ones() -> Iterator[Any]:
            while time.monotonic_ns() < end_ns and (one := next(waiting, None)):
                yield one

        async def stream() -> None:
            for index, _, prepared in next_ones():
                await self._launch(Record(index, time.monotonic_ns()), prepared)

        await asyncio.gather(*(stream() for _ in range(self._task.concurrency)))

    def _launch(self, record: Record, prepared: Prepared) -> asyncio.Task[None]:
        self._progress.sent += 1
        self._unanswered += 1
        task = asyncio.get_running_loop().create_task(self._one(record, prepared))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)
        return task

    async def _one(self, record: Record, prepared: Prepared) -> None:
        try:
            await self._wire.send(prepared, record, self._task.deadline_s)
        finally:
            if record.sent_ns:
                self._last_sent_ns = max(self._last_sent_ns, record.sent_ns)
                self._file.write(record.line())
            self._unanswered -= 1
            self._progress.ended += 1
            self._progress.failed += record.outcome != OK
            self._progress.tokens += record.timing.output_tokens or 0
            if (ttft := record.timing.ttft_ns) is not None:
                self._progress.ttft_ms.append(ttft / 1e6)
        await self._watch.look_after(record)
        if self._watch.sure:
            self._stop.set()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            self._tell()
            if self._pipe.poll():
                self._pipe.recv()  # the only thing that is said meanwhile is to stop
                self._stop.set()

    def _tell(self) -> None:
        self._progress.in_flight = self._unanswered
        self._pipe.send(("progress", asdict(self._progress)))
        self._progress = Progress()
