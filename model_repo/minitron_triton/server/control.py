"""What only a server's own supervisor may ask of it, over HTTP on this machine: Triton's logging and repository APIs.

Paths: Triton's extensions "logging" and "model repository" of the KServe protocol, closed to clients by the server key.
"""

from __future__ import annotations

import http.client
import json

from minitron_triton.server.launch import Options

_TIMEOUT_S = 5.0


class Refused(Exception):
    """The server did not do it: it hangs, is gone, or does not know how."""


class Control:
    """A running server's inner interfaces; each call raises ``Refused`` where it was not done."""

    def __init__(self, options: Options, port: int) -> None:
        self._options, self._port = options, port
        self._timeout_s = min(_TIMEOUT_S, options.exit_timeout_s)

    def log_verbosely(self, *, verbose: bool) -> None:
        """Let the server log what each of its parts does, or stop that."""
        self._post("/v2/logging", {"log_verbose_level": int(verbose)})

    def unload(self, model: str) -> None:
        """Give the model no new request; it ends by itself when the requests that it has are answered."""
        self._post(f"/v2/repository/models/{model}/unload", {})

    def _post(self, path: str, body: object) -> None:
        headers = {"Content-Type": "application/json", "server-key": self._options.server_key}
        connection = http.client.HTTPConnection(self._options.probe_host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            said = answer.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise Refused(f"{path}: HTTP {answer.status} {said}")
