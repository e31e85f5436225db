"""TLS and API key at the real tritonserver, for clients and for its own models, which call it back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from conftest import minitron_here
from minitron.errors import InvalidRequest, NotReady
from minitron.text.engine import Address, EngineCallError, EngineClient
from minitron_client.client import ApiKey, Tls
from supervisor import Supervisor, ask, environment, stub

pytestmark = pytest.mark.server

KEY = "a-key-that-must-not-be-seen"


def answers_its_own_model(one: Supervisor) -> bool:
    """Call the server as a model of it does, by nothing but the documented environment variables."""
    known = environment(stub(one.mark))
    channel = grpc.insecure_channel(known["MINITRON_GRPC"])
    if "MINITRON_GRPC_CA" in known:
        files = [
            Path(known[name]).read_bytes() if name in known else None
            for name in ("MINITRON_GRPC_CA", "MINITRON_GRPC_KEY", "MINITRON_GRPC_CERT")
        ]
        override = ("grpc.ssl_target_name_override", known["MINITRON_GRPC_AUTHORITY"])
        channel = grpc.secure_channel(known["MINITRON_GRPC"], grpc.ssl_channel_credentials(*files), [override])
    key_file = known.get("MINITRON_GRPC_API_KEY_FILE")
    metadata = [("triton-grpc-protocol-api-key", Path(key_file).read_text().strip())] if key_file else []
    with channel:
        server = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = service_pb2.ModelMetadataRequest(name="echo")
        return bool(server.ModelMetadata(asked, metadata=metadata, timeout=30).name == "echo")


def refusal(address: Address) -> str:
    """What the text code says of a server that refuses its request."""

    async def ask_it() -> str:
        engine = EngineClient("echo", address)
        inputs = {"text_input": np.array([b"x"], dtype=object), "max_tokens": np.array([1], np.int32)}
        with pytest.raises(EngineCallError) as error:
            async for _ in engine.batches(inputs, ["text_output"], "the-id"):
                pass
        await engine.close()
        return str(error.value)

    return asyncio.run(ask_it())


def test_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    assert ask(one.url, 2, tls=Tls(certificates / "ca.crt")) == ["0 ", "1 "]
    for wrong in (None, Tls()):  # plain; an authority that did not sign it
        with pytest.raises(NotReady):
            ask(one.url, 1, tls=wrong)
    status, answer = http(one.document["urls"]["http"], "/v2/models/echo")
    assert (status, "restricted" in answer) == (403, True)
    assert http(one.document["urls"]["http"], "/v2/health/ready")[0] == 200
    assert answers_its_own_model(one)


def test_mutual_tls(echo: Path, serve: Callable[..., Supervisor], certificates: Path) -> None:
    one = serve(echo, "--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key",
                "--tls-ca", certificates / "ca.crt")  # fmt: skip
    ours = Tls(certificates / "ca.crt", certificates / "client.crt", certificates / "client.key")
    assert ask(one.url, 2, tls=ours) == ["0 ", "1 "]
    with pytest.raises(NotReady):
        ask(one.url, 1, tls=Tls(certificates / "ca.crt"))
    assert answers_its_own_model(one)  # with the server's own certificate, which the same authority signed


def test_a_certificate_for_another_name_and_for_servers_alone(
    echo: Path, serve: Callable[..., Supervisor], certificates: Path
) -> None:
    one = serve(
        echo, "--tls-cert", certificates / "elsewhere.crt", "--tls-key", certificates / "elsewhere.key",
        "--tls-ca", certificates / "ca.crt", "--loopback-cert", certificates / "client.crt",
        "--loopback-key", certificates / "client.key",
    )  # fmt: skip
    assert environment(stub(one.mark))["MINITRON_GRPC_AUTHORITY"].endswith("k.example.org")  # no wildcard in a name
    assert answers_its_own_model(one)


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
    (tmp_path / "other").write_text("another-key-of-length")
    for given in ("", str(tmp_path / "other")):
        refused = refusal(Address(one.url, api_key_file=given))
        assert "restricted" in refused and "cannot be reached" not in refused
        assert "MINITRON_GRPC_API_KEY_FILE in the server's environment, or the parameter grpc_api_key_file," in refused
    for words in ((), ("--upstream-api-key-file", tmp_path / "other")):
        code, _, said = minitron_here(
            "gateway", "--upstream", one.url, "--wait", "0", "--listen", "127.0.0.1:0", *words
        )
        assert code == InvalidRequest.exit_code and "restricted" in said and "--upstream-api-key-file" in said
    assert http(address, "/v2/models/echo", {"api-key": KEY})[0] == 200
    assert http(address, "/v2/models/echo", {"api-key": "wrong"})[0] == 403
    assert http(address, "/v2/models/echo")[0] == 403
    assert http(address, "/v2/health/ready")[0] == 200
    assert answers_its_own_model(one)
    for path in one.state.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in " ".join(environment(stub(one.mark)).values())
    one.send(signal.SIGTERM)
    code, said = one.end()
    assert code == 0
    assert KEY not in said
    assert "command line" in said  # the warning


def test_an_api_key_from_a_pipe_is_kept_from_others(
    echo: Path, serve: Callable[..., Supervisor], tmp_path: Path
) -> None:
    """As in bash's --api-key-file <(pass show key): what can be read once has to lie somewhere for the models."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(KEY,))
    writer.start()
    one = serve(echo, "--api-key-file", pipe)
    writer.join()
    assert ask(one.url, 2, api_key=ApiKey(KEY)) == ["0 ", "1 "]
    assert answers_its_own_model(one)
    (kept,) = [path for path in one.state.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert kept.stat().st_mode & 0o777 == 0o600
    one.send(signal.SIGTERM)
    assert one.end()[0] == 0
    assert not kept.exists()


def http(address: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    from http.client import HTTPConnection

    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
