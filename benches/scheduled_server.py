"""A bare gRPC process that speaks Triton's ModelStreamInfer and sends tokens by a schedule of its own.

Not Triton: the known schedule against which the client's clock is measured. A request to the model ``scheduled`` is
answered with max_tokens responses, one every ``--interval-ms``; each carries when it was due and when it was really
handed to gRPC (``due_ns``, ``sent_ns``, CLOCK_MONOTONIC, which all processes of a machine share). A request to ``null``
is answered at once. How many requests came, and when the first and last did, is written to ``--counts`` every second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from minitron_trtllm import files
from minitron_trtllm.load.pacing import Pacer

_TICK_NS = 1_000_000
_DUE, _SENT = b"<<DUE>>.", b"<<SENT>>"


class _Template:
    """A response as bytes in which the two times are overwritten."""

    def __init__(self, *, final: bool) -> None:
        infer = pb.ModelInferResponse(model_name="scheduled")
        infer.parameters["triton_final_response"].bool_param = final
        one = struct.pack("<i", 1)
        for name, kind, raw in (("text_output", "BYTES", one + b"x"), ("num_output_tokens", "INT32", one),
                                ("num_input_tokens", "INT32", one), ("due_ns", "INT64", _DUE),
                                ("sent_ns", "INT64", _SENT)):  # fmt: skip
            infer.outputs.add(name=name, datatype=kind, shape=[1, 1])
            infer.raw_output_contents.append(raw)
        self._bytes = bytearray(pb.ModelStreamInferResponse(infer_response=infer).SerializeToString())
        self._due, self._sent = self._bytes.index(_DUE), self._bytes.index(_SENT)

    def stamped(self, due_ns: int) -> bytes:
        """The bytes with ``due_ns`` and the time now."""
        struct.pack_into("<q", self._bytes, self._due, due_ns)
        struct.pack_into("<q", self._bytes, self._sent, time.monotonic_ns())
        return bytes(self._bytes)


class _Ticks:
    """Wakes every stream that is due; due times are whole milliseconds, so that one timer serves many."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def until(self, due_ns: int) -> None:
        """Return at ``due_ns``."""
        if due_ns <= time.monotonic_ns():
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (due_ns, id(future), future))
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())
        await future

    async def _run(self) -> None:
        pacer = Pacer()
        while self._waiting:
            tick_ns = (time.monotonic_ns() // _TICK_NS + 1) * _TICK_NS
            await pacer.until(tick_ns)  # never longer: a stream that comes meanwhile may be due earlier than all others
            while self._waiting and self._waiting[0][0] <= time.monotonic_ns():
                heapq.heappop(self._waiting)[2].set_result(None)
        self._running = None
        pacer.close()


class Scheduled:
    """The service; one handler, raw bytes out."""

    def __init__(self, interval_ns: int) -> None:
        self._interval_ns = interval_ns
        self._middle, self._last = _Template(final=False), _Template(final=True)
        self._ticks = _Ticks()
        self.requests, self.first_ns, self.last_ns = 0, 0, 0

    async def infer(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[bytes]:
        """ModelStreamInfer."""
        async for request in requests:
            now_ns = time.monotonic_ns()
            self.requests, self.first_ns, self.last_ns = self.requests + 1, self.first_ns or now_ns, now_ns
            if request.model_name == "null":
                yield self._last.stamped(now_ns)
                continue
            start_ns = now_ns // _TICK_NS * _TICK_NS
            tokens = _max_tokens(request)
            for number in range(1, tokens + 1):
                due_ns = start_ns + number * self._interval_ns
                await self._ticks.until(due_ns)
                yield (self._last if number == tokens else self._middle).stamped(due_ns)


def _max_tokens(request: Any) -> int:
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name == "max_tokens":
            return int(struct.unpack("<i", raw)[0])
    return 1


async def _serve(interval_ms: int, counts: Path) -> None:
    service = Scheduled(interval_ms * _TICK_NS)
    handler = grpc.stream_stream_rpc_method_handler(service.infer, pb.ModelInferRequest.FromString, None)
    gc.disable()  # a collection in the middle would be lateness; the process lives for minutes
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelStreamInfer": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    while True:
        await asyncio.sleep(1)
        document = {"requests": service.requests, "first_ns": service.first_ns, "last_ns": service.last_ns}
        files.write_text(counts, json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interval-ms", type=int, required=True)
    parser.add_argument("--counts", type=Path, required=True)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.interval_ms, arguments.counts))
