"""Whether a server is ready, and the first request that warms it up, over HTTP on this machine.

Paths: KServe predict protocol v2 (health) and Triton's generate extension. Health needs no key and HTTP has no TLS in
Triton, so no client certificate is needed here.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable

from minitron.errors import ServerError
from minitron.text.channel import API_KEY
from minitron_triton.server.launch import Options, Served

_PROBE_TIMEOUT_S = 5.0
_WARM_UP_TOKENS = 4


def is_ready(host: str, port: int, models: Iterable[str]) -> bool:
    """Whether the server and each of the models say that they are ready."""
    paths = ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)]
    try:
        return all(_status(host, port, path) == 200 for path in paths)
    except (OSError, http.client.HTTPException):
        return False


def _status(host: str, port: int, path: str) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def warm_up(served: Served, options: Options, port: int, timeout_s: float) -> None:
    """Generate a few tokens through the front, because the first request is slow; raises ServerError."""
    front = served.front
    names = ("sampling_param_max_tokens", "streaming") if served.backend == "llmapi" else ("max_tokens", "stream")
    body = json.dumps({"text_input": "The", names[0]: _WARM_UP_TOKENS, names[1]: True})
    headers = {"Content-Type": "application/json", "server-key": options.server_key}
    if options.api_key and not options.tls:
        headers[API_KEY] = options.api_key
    connection = http.client.HTTPConnection(options.probe_host, port, timeout=timeout_s)
    try:
        connection.request("POST", f"/v2/models/{front}/generate_stream", body, headers)
        answer = connection.getresponse()
        events = answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"the first request to {front} failed ({error or type(error).__name__})") from error
    finally:
        connection.close()
    # An error after the first token arrives inside a stream of status 200.
    if answer.status != 200 or '"error"' in events:
        raise ServerError(f"the first request to {front} failed (HTTP {answer.status}): {events.strip()[-300:]}")
