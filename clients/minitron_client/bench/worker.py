"""A sending process: it gets its requests as bytes with their times, sends them, and writes each record as it ends.

It talks to the run over a pipe, in this order: it says ``ready``; it is told when to start; while it sends it reports
what happened every quarter of a second, and may be told to ``stop``; when it has ended, or the server has, it says when
it last sent and whether the server is gone, and goes once it is told ``end``.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

from minitron_client.bench.loops import Sendable, SendLoop
from minitron_client.bench.process import no_pauses
from minitron_client.bench.record import OK, Record
from minitron_client.bench.sender import sender_to
from minitron_client.bench.watch import GoneWatch
from minitron_client.client.openai import AnyEndpoint

_REPORT_S = 0.25


@dataclass
class Progress:
    """What happened since the last report: ``tokens`` of requests that ended, ``ttft_ms`` of first tokens that came."""

    sent: int = 0
    ended: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    sent_before: int = 0

    def count(self, record: Record) -> None:
        """Count a request that has ended."""
        self.ended += 1
        self.failed += record.outcome != OK
        self.tokens += record.timing.output_tokens or 0
        if (ttft := record.timing.ttft_ns) is not None:
            self.ttft_ms.append(ttft / 1e6)

    def add(self, other: Progress) -> None:
        """Add what ``other`` counted; requests in flight are no sum over time."""
        self.sent += other.sent
        self.ended += other.ended
        self.failed += other.failed
        self.tokens += other.tokens
        self.ttft_ms += other.ttft_ms


@dataclass(frozen=True)
class LoadWorker:
    """What one process does: its requests, how many of them at once where the loop is closed, and its records' file."""

    endpoint: AnyEndpoint
    requests: list[Sendable]
    concurrency: int
    duration_s: float
    deadline_s: float | None
    records: Path

    def main(self, pipe: Connection) -> None:
        """Entry point of the process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the run tells us to stop
        with self.records.open("w", buffering=1, encoding="utf-8") as file:
            last_sent_ns, watch = asyncio.run(self._send_all(pipe, file))
        pipe.send(("done", (last_sent_ns, watch.suspected, watch.sure)))
        with contextlib.suppress(EOFError):  # the run is no more
            while pipe.recv() != "end":
                pass  # to stop, said when there was nothing left to stop

    async def _send_all(self, pipe: Connection, file: TextIO) -> tuple[int, GoneWatch]:
        sender, progress = sender_to(self.endpoint), Progress()

        def ended(record: Record) -> None:
            if record.sent_ns:
                file.write(record.line())
            progress.count(record)

        loop = SendLoop(sender, ended=ended, deadline_s=self.deadline_s)

        def tell() -> None:
            nonlocal progress
            told, progress = progress, Progress(sent_before=loop.sent)
            told.sent, told.in_flight = loop.sent - told.sent_before, loop.in_flight
            pipe.send(("progress", told))

        async def report() -> None:
            while True:
                await asyncio.sleep(_REPORT_S)
                tell()
                if pipe.poll():
                    pipe.recv()  # the only thing that is said meanwhile is to stop
                    loop.stop()

        pipe.send(("ready", None))
        start_ns = await asyncio.to_thread(pipe.recv)
        with no_pauses():
            reporting = asyncio.ensure_future(report())
            await self._send(loop, start_ns)
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            tell()
            await sender.close()
        return loop.last_sent_ns, loop.watch

    async def _send(self, loop: SendLoop, start_ns: int) -> None:
        if self.requests and self.requests[0][1] is None:
            await asyncio.sleep(max(start_ns - time.monotonic_ns(), 0) / 1e9)
            await loop.closed(self.requests, self.concurrency, start_ns + round(self.duration_s * 1e9))
        else:
            await loop.open(self.requests, start_ns)
