"""The server's other transport: Triton's generate endpoints over HTTP, asked with JSON.

``/generate`` answers once; ``/generate_stream`` sends server-sent events, each a JSON object, an error among them.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any


class Events(Iterator[dict[str, Any]]):
    """The JSON objects of an answer as they come; ``status``: HTTP's."""

    def __init__(
        self, address: str, headers: Mapping[str, str], model: str, asked: Mapping[str, Any], *, deadline_s: float
    ) -> None:
        streams = any(asked.get(name) for name in ("stream", "streaming"))
        self._streams, self._connection = streams, http.client.HTTPConnection(address, timeout=deadline_s)
        path = f"/v2/models/{model}/generate{'_stream' if streams else ''}"
        self._connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json", **headers})
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def __next__(self) -> dict[str, Any]:
        while line := self._response.readline() if self._streams else self._response.read():
            if text := line.strip().removeprefix(b"data:").strip():
                return dict(json.loads(text))
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Go away, whether all has come or not."""
        self._connection.close()


def values(event: Mapping[str, Any], name: str) -> list[Any]:
    """An output's values: Triton writes one that has a single value without brackets, and no other."""
    found = event.get(name, [])
    return list(found) if isinstance(found, list) else [found]
