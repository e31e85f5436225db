"""Clients of a served model: the library, load tests and their reports.

``from minitron_client import Client``: the library's names are here too, see ``minitron_client.client``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron_client.client import (
        ApiKey,
        AsyncClient,
        AsyncStream,
        Chunk,
        Client,
        Endpoint,
        Output,
        Request,
        Response,
        Retry,
        Stream,
        Timing,
        Tls,
    )

__all__ = [
    "ApiKey", "AsyncClient", "AsyncStream", "Chunk", "Client", "Endpoint", "Output",
    "Request", "Response", "Retry", "Stream", "Timing", "Tls",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The library is imported with the first name of it: reports and schedules do without gRPC."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minitron_client import client

    return getattr(client, name)
