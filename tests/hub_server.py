"""A stand-in for Hugging Face: what huggingface_hub needs of it, on 127.0.0.1, with ranges and broken lines."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves ``folder`` as the model ``model``, revision main; ``asked`` lists (method, file, range header).

    ``break_after``: bytes after which the next answer with a longer body ends in the middle, once.
    """

    daemon_threads = True

    def __init__(self, folder: Path, model: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.model = folder, model
        self.asked: list[tuple[str, str, str | None]] = []
        self.break_after: int | None = None

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        found = api or file
        if not found or found[1] != self.server.model:
            return self._error("RepoNotFound")
        if found[2] not in (None, "main", COMMIT):
            return self._error("RevisionNotFound")
        if api:
            names = [path.relative_to(self.server.folder).as_posix() for path in self.server.folder.rglob("*.*")]
            info = {"id": self.server.model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._send(json.dumps(info).encode(), body, "application/json")
        self.server.asked.append((self.command, found[3], self.headers.get("Range")))
        path = self.server.folder / found[3]
        return self._send(path.read_bytes(), body) if path.exists() else self._error("EntryNotFound")

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, body: bool, kind: str = "application/octet-stream") -> None:
        start = int(re.sub(r"\D", "", (self.headers.get("Range") or "0").split("-")[0]) or 0)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        limit = self.server.break_after
        if body and limit is not None and len(content) - start > limit:
            self.server.break_after = None
            self.wfile.write(content[start : start + limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif body:
            self.wfile.write(content[start:])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub(folder: Path, model: str) -> Iterator[HubServer]:
    """Run the server in a thread for as long as the block lasts."""
    with HubServer(folder, model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
