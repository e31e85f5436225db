"""TCP ports that nobody else takes between choosing them and Triton listening on them.

A port is reserved by a socket that is bound and does not listen. Both that socket and Triton's set SO_REUSEADDR, so
Linux lets Triton bind the same port, and gives it to nobody who asks for a free one (socket(7)).
"""

from __future__ import annotations

import errno
import socket
from types import TracebackType

from minitron.errors import MachineError, PortBusy, UsageError
from minitron_triton.server.launch import Options, Ports


class Reservation:
    """The three ports of a server, held until ``release`` or the end of the block."""

    def __init__(self, options: Options, wanted: Ports) -> None:
        """``wanted`` ports that are 0 become free ones; raises UsageError, PortBusy (naming the port)."""
        chosen = [port for port in (wanted.grpc, wanted.http, wanted.metrics) if port]
        if len(set(chosen)) < len(chosen) or not all(0 < port < 1 << 16 for port in chosen):
            raise UsageError(
                f"ports {chosen} for gRPC, HTTP and metrics: three different numbers below 65536 are needed"
            )
        self._sockets: list[socket.socket] = []
        try:
            self.ports = Ports(
                grpc=self._reserve(options.host, wanted.grpc, "--grpc-port"),
                http=self._reserve(options.http_host, wanted.http, "--http-port"),
                metrics=self._reserve(options.http_host, wanted.metrics, "--metrics-port"),
            )
        except BaseException:
            self.release()
            raise

    def _reserve(self, host: str, port: int, flag: str) -> int:
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortBusy(f"port {port} of {host} is taken; stop what listens there or give another {flag}, "
                               "0 for a free one") from None  # fmt: skip
            raise MachineError(f"cannot listen on {host}:{port} ({error.strerror}); see --host and {flag}") from None
        return int(held.getsockname()[1])

    def release(self) -> None:
        """Let go of the ports; Triton listens on them now, or nobody will."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
