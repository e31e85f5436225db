"""A bare process that speaks Triton's ModelStreamInfer and answers on a schedule of its own, stamping every response.

Not Triton: the known schedule against which the client's clock is measured. A request to the model ``scheduled`` is
answered with max_tokens responses on the schedule that its prompt holds (``timetable.Schedule``); each carries when it
was due and when it was really handed to the socket (``times_ns``, CLOCK_MONOTONIC, which all processes of a machine
share). A request to ``null`` is answered at once.

The port goes to stdout. To every line on stdin it answers there how many requests came, and when the first and the
last did.
"""

from __future__ import annotations

import contextlib
import gc
import json
import select
import socket
import struct
import sys
import time
from typing import Any

from http2 import Connection
from timetable import Schedule, Timetable, be_punctual
from tritonclient.grpc import service_pb2 as pb

_TIMES = b"<<DUE>>.<<SENT>>"


class _Template:
    """A response as bytes in which the two times are overwritten."""

    def __init__(self, *, final: bool) -> None:
        infer = pb.ModelInferResponse(model_name="scheduled")
        infer.parameters["triton_final_response"].bool_param = final
        for name, kind, size, raw in (
            ("num_output_tokens", "INT32", 1, struct.pack("<i", 1)), ("times_ns", "INT64", 2, _TIMES)
        ):  # fmt: skip
            infer.outputs.add(name=name, datatype=kind, shape=[1, size])
            infer.raw_output_contents.append(raw)
        self._bytes = bytearray(pb.ModelStreamInferResponse(infer_response=infer).SerializeToString())
        self._times = self._bytes.index(_TIMES)

    def stamped(self, due_ns: int) -> bytes:
        """The bytes with ``due_ns`` and the time now."""
        struct.pack_into("<qq", self._bytes, self._times, due_ns, time.monotonic_ns())
        return bytes(self._bytes)


class Scheduled:
    """The service, in one thread: it waits for what comes next, a request or a moment at which something is due."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[Connection] = set()
        self._timetable: Timetable[tuple[Connection, int]] = Timetable()
        self._middle, self._last = _Template(final=False), _Template(final=True)
        self._requests, self._first_ns, self._last_ns = 0, 0, 0

    def turn(self) -> bool:
        """Wait for the next event and do what it asks for; False once stdin has ended."""
        due_ns = self._timetable.next_ns
        wait_s = None if due_ns is None else max(due_ns - time.monotonic_ns(), 0) / 1e9
        readable, _, _ = select.select([self._listener, sys.stdin, *self._connections], [], [], wait_s)
        for one in readable:
            if isinstance(one, Connection):
                self._receive(one)
            elif one is self._listener:
                self._connections.add(Connection(self._listener.accept()[0]))
            elif not sys.stdin.readline():
                return False
            else:
                print(self._counts(), flush=True)
        self._send_due()
        return True

    def _receive(self, connection: Connection) -> None:
        with self._ends_with(connection):
            for stream, message in connection.receive():
                now_ns = time.monotonic_ns()
                self._requests, self._first_ns, self._last_ns = self._requests + 1, self._first_ns or now_ns, now_ns
                request = pb.ModelInferRequest.FromString(message)
                if request.model_name == "null":
                    connection.send(stream, self._last.stamped(now_ns), last=True)
                    continue
                prompt, tokens = _asked(request)
                self._timetable.add((connection, stream), Schedule.of_prompt(prompt), tokens, now_ns)

    def _send_due(self) -> None:
        while due := self._timetable.take(time.monotonic_ns()):
            connection, stream = due.stream
            if connection in self._connections:
                template = self._last if due.is_last else self._middle
                with self._ends_with(connection):
                    connection.send(stream, template.stamped(due.due_ns), last=due.is_last)

    @contextlib.contextmanager
    def _ends_with(self, connection: Connection) -> Any:
        try:
            yield
        except ConnectionError:
            self._connections.discard(connection)
            connection.close()

    def _counts(self) -> str:
        return json.dumps({"requests": self._requests, "first_ns": self._first_ns, "last_ns": self._last_ns})


def _asked(request: Any) -> tuple[str, int]:
    """Prompt and max_tokens."""
    raw = {one.name: raw for one, raw in zip(request.inputs, request.raw_input_contents, strict=True)}
    return raw["text_input"][4:].decode(), int(struct.unpack("<i", raw["max_tokens"])[0])


def main() -> None:
    """Serve until stdin ends."""
    service = Scheduled()
    gc.freeze()
    gc.disable()  # a collection in the middle would be lateness; the process lives for minutes
    be_punctual()
    print(service.port, flush=True)
    while service.turn():
        pass


if __name__ == "__main__":
    main()
