"""``minitron gateway`` beside a server, with its lifetime: OpenAI's HTTP API over the very server that is supervised.

A program of its own (rooms do not import one another), told where its server listens as the server's own models are:
by environment. It starts when the server is ready, is started again where it dies, and drains before the server does:
from then on it takes nothing new, and the streams that it accepted end in the server's own drain.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from pathlib import Path

from minitron import children
from minitron.errors import ServerError, UsageError
from minitron_triton.server.launch import Options, Ports, Served, loopback, reachable, without_loopback
from minitron_triton.server.running import ending, start_child

log = logging.getLogger(__name__)

_TEXT_MODEL = "tensorrt_llm_bls"
_HEAD_START_S = 0.5  # for an idle one to end, and for one with streams to take no new ones
_LAST_S = 10.0  # behind the end of the server, and so of every stream
_RESTART_AFTER_S = 1.0


class OpenAi:
    """The gateway of one server."""

    def __init__(self, served: Served, options: Options, ports: Ports, port: int, log_path: Path) -> None:
        """It is to listen on ``port`` (0: a free one). Raises UsageError for a repository that it cannot serve."""
        if served.front != _TEXT_MODEL:
            raise UsageError(f"--openai needs the text model {_TEXT_MODEL}, and {served.folder} serves {served.front}")
        self._served, self._options, self._log_path = served, options, log_path
        self._address, self._port = options.host, port
        self._environment = without_loopback(os.environ) | loopback(
            f"{reachable(options.host)}:{ports.grpc}", options.tls, options.api_key_file
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._died = 0.0

    def start(self) -> str:
        """Start it and wait until it listens; returns its HOST:PORT. Raises ServerError."""
        child = start_child(self._argv(), self._environment, self._log_path, stdout=subprocess.PIPE)
        assert child.stdout is not None
        text = b""
        for line in child.stdout:
            text += line
            if line == b"}\n":
                break
        else:
            lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line for line in reversed(lines) if line.startswith("minitron: error: ")), "")
            why = said.removeprefix("minitron: error: ") or f"{ending(child.wait())}, see {self._log_path}"
            raise ServerError(f"the OpenAI endpoint did not start: {why}")
        self._child = child
        address = str(json.loads(text)["url"]).partition("://")[2].removesuffix("/v1")
        self._port = int(address.rpartition(":")[2])  # the same when it is started again
        return address

    def restart_if_dead(self) -> None:
        """Start it again, after a moment, where it has died."""
        if self._child is not None and self._child.poll() is not None:
            log.error(
                "the OpenAI endpoint ended by itself with %s; it is started again", ending(self._child.returncode)
            )
            self._child, self._died = None, time.monotonic()
        if self._child is None and time.monotonic() - self._died > _RESTART_AFTER_S:
            try:
                self.start()
            except ServerError as error:
                log.error("%s", error)
                self._died = time.monotonic()

    def drain(self) -> None:
        """Let it take nothing new; an idle one ends at once."""
        if self._child is not None:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_HEAD_START_S)

    def end(self) -> None:
        """Behind the end of the server: wait for it, not for long."""
        if self._child is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.terminate()
            self._child.wait(_LAST_S)
        self._child.kill()
        self._child.wait()

    def _argv(self) -> tuple[str, ...]:
        options = self._options
        words: list[str | Path] = [
            "gateway", "--listen", f"{self._address}:{self._port}", "--repository", self._served.folder, "--json",
            "--drain-timeout", str(options.exit_timeout_s),
        ]  # fmt: skip
        if options.tls:
            words += ["--tls-cert", options.tls.certificate, "--tls-key", options.tls.key]
        if options.api_key_file:
            words += ["--api-key-file", options.api_key_file]
        return (*children.COMMAND, *map(str, words))
