"""TLS and API key at the real tritonserver."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_trtllm.client import ApiKey, Tls
from minitron_trtllm.errors import InvalidRequest, NotReady
from supervisor import Supervisor, ask

pytestmark = pytest.mark.server

KEY = "a-key-that-must-not-be-seen"


def test_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    assert ask(one.url, 2, tls=Tls(certificates / "ca.crt")) == ["0 ", "1 "]
    for wrong in (None, Tls()):  # plain; an authority that did not sign it
        with pytest.raises(NotReady):
            ask(one.url, 1, tls=wrong)
    status, answer = http(one.document["urls"]["http"], "/v2/models/echo")
    assert (status, "restricted" in answer) == (403, True)
    assert http(one.document["urls"]["http"], "/v2/health/ready")[0] == 200


def test_mutual_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key",
                "--tls-ca", certificates / "ca.crt")  # fmt: skip
    ours = Tls(certificates / "ca.crt", certificates / "client.crt", certificates / "client.key")
    assert ask(one.url, 2, tls=ours) == ["0 ", "1 "]
    with pytest.raises(NotReady):
        ask(one.url, 1, tls=Tls(certificates / "ca.crt"))


def test_api_key(echo: Path, serve: Callable[..., Supervisor], tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    one = serve(echo, "--api-key-file", file, "--verbose")
    address = one.document["urls"]["http"]
    assert ask(one.url, 2, api_key=ApiKey(KEY)) == ["0 ", "1 "]
    for wrong in (None, ApiKey("another-key-of-length")):
        with pytest.raises(InvalidRequest, match="restricted"):
            ask(one.url, 1, api_key=wrong)
    assert http(address, "/v2/models/echo", {"api-key": KEY})[0] == 200
    assert http(address, "/v2/models/echo", {"api-key": "wrong"})[0] == 403
    assert http(address, "/v2/models/echo")[0] == 403
    assert http(address, "/v2/health/ready")[0] == 200
    for path in one.state.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 0
    assert KEY not in said
    assert "command line" in said  # the warning


def http(address: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    from http.client import HTTPConnection

    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
