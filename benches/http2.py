"""The server's side of a gRPC connection in plain bytes: as much of HTTP/2 as gRPC's own client speaks, and no more.
``request`` is the little of a client's side that asks once.

grpc.aio costs 100 to 200 microseconds for a message, which would make a server with a known schedule as late as the
client that it is there to measure; this costs about ten. Sources: RFC 9113 (HTTP/2), RFC 7541 (header compression) and
gRPC's PROTOCOL-HTTP2.md. Every request is taken for one of the same method, one message long; its headers are not read.
"""

from __future__ import annotations

import socket
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_ACKNOWLEDGED = _END_STREAM = 1
_END_HEADERS = 4
_MOST_STREAMS, _INITIAL_WINDOW = 3, 4  # identifiers of settings
_WINDOW = 65535
_LARGEST_WINDOW = (1 << 31) - 1
# Fields by their index in the static table, and literals that are not added to any table.
_STATUS_200 = b"\x88"
_RESPONSE_HEADERS = _STATUS_200 + b"\x0f\x10\x10application/grpc"  # content-type is entry 31 = 15 + 16
_TRAILERS = b"\x00\x0bgrpc-status\x010"
_POST_HTTP = b"\x83\x86"
_PATH, _AUTHORITY = b"\x04", b"\x01"
_REQUEST_HEADERS = b"\x0f\x10\x10application/grpc\x00\x02te\x08trailers"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame: three bytes of length, type, flags, stream, payload."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request(path: str, authority: str, message: bytes) -> bytes:
    """All that a client sends for one request on a connection of its own, as stream 1."""
    headers = _POST_HTTP + _PATH + _string(path) + _AUTHORITY + _string(authority) + _REQUEST_HEADERS
    return (
        _PREFACE
        + frame(_SETTINGS, 0, 0, b"")
        + frame(_HEADERS, _END_HEADERS, 1, headers)
        + frame(_DATA, _END_STREAM, 1, b"\x00" + struct.pack(">I", len(message)) + message)
    )


def _string(text: str) -> bytes:
    assert len(text) < 127  # one byte of length
    return bytes([len(text)]) + text.encode("ascii")


class Connection:
    """One client. Its streams are known by their numbers on the connection."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._arrived = bytearray()
        self._preface_left = len(_PREFACE)
        self._asked: dict[int, bytearray] = {}  # what has come of each request
        self._windows: dict[int, int] = {0: _WINDOW}  # bytes that each stream, and (0) all together, may be sent
        self._initial_window = _WINDOW
        self._begun: set[int] = set()
        connected.sendall(
            frame(_SETTINGS, 0, 0, struct.pack(">HI", _MOST_STREAMS, _LARGEST_WINDOW))
            + frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _WINDOW))
        )

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def receive(self) -> list[tuple[int, bytes]]:
        """Read what has come: requests that are whole now, as (stream, message). Raises ConnectionError at the end."""
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the client has hung up")
        self._arrived += data
        if self._preface_left:
            if len(self._arrived) < len(_PREFACE):
                return []
            del self._arrived[: len(_PREFACE)]
            self._preface_left = 0
        requests = []
        while (taken := self._frame()) is not None:
            requests += self._take(*taken)
        return requests

    def send(self, stream: int, message: bytes, *, last: bool) -> bool:
        """Send a response of a stream; False if the client has given the stream up.

        Raises ConnectionError for a client that is so late that its flow control allows no more.
        """
        if stream not in self._windows:
            return False
        body = b"\x00" + struct.pack(">I", len(message)) + message
        self._windows[0] -= len(body)
        self._windows[stream] -= len(body)
        if min(self._windows[0], self._windows[stream]) < 0:
            raise ConnectionAbortedError("the client does not read what it is sent")
        parts = frame(_DATA, 0, stream, body)
        if stream not in self._begun:
            self._begun.add(stream)
            parts = frame(_HEADERS, _END_HEADERS, stream, _RESPONSE_HEADERS) + parts
        if last:
            self._forget(stream)
            parts += frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, _TRAILERS)
        self._socket.sendall(parts)
        return True

    def _frame(self) -> tuple[int, int, int, bytes] | None:
        """The next whole frame: type, flags, stream, payload."""
        if len(self._arrived) < 9:
            return None
        end = 9 + int.from_bytes(self._arrived[:3], "big")
        if len(self._arrived) < end:
            return None
        kind, flags, stream = struct.unpack_from(">BBI", self._arrived, 3)
        payload = bytes(self._arrived[9:end])
        del self._arrived[:end]
        return kind, flags, stream, payload

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> list[tuple[int, bytes]]:
        if kind == _HEADERS:
            self._asked[stream] = bytearray()
            self._windows[stream] = self._initial_window
        elif kind == _DATA and stream in self._asked:
            return self._body(stream, payload)
        elif kind == _RESET:
            self._forget(stream)
        elif kind == _WINDOW_UPDATE and stream in self._windows:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == _PING and not flags & _ACKNOWLEDGED:
            self._socket.sendall(frame(_PING, _ACKNOWLEDGED, 0, payload))
        elif kind == _SETTINGS and not flags & _ACKNOWLEDGED:
            self._settings(payload)
        return []

    def _body(self, stream: int, payload: bytes) -> list[tuple[int, bytes]]:
        """More of a request: a byte that says it is not compressed, four of length, the message."""
        asked = self._asked[stream]
        asked += payload
        if len(asked) < 5 or len(asked) < 5 + int.from_bytes(asked[1:5], "big"):
            return []
        del self._asked[stream]
        return [(stream, bytes(asked[5:]))]

    def _settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW:  # it changes the windows of the streams that are open, too
                for stream in self._windows.keys() - {0}:
                    self._windows[stream] += value - self._initial_window
                self._initial_window = value
        self._socket.sendall(frame(_SETTINGS, _ACKNOWLEDGED, 0, b""))

    def _forget(self, stream: int) -> None:
        self._asked.pop(stream, None)
        self._windows.pop(stream, None)
        self._begun.discard(stream)
