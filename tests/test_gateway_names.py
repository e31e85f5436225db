"""Servers behind a name: what is asked when the name changes.

The whole of it, on a real resolver, with real servers and under load, is ``test_deploy_pods``.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from conftest import SMALL_MODEL, minitron
from gateway_process import Gateway, within
from minitron.text.engine import Address
from minitron_gateway.metrics import Metrics
from minitron_gateway.names import Names


def looked_up(*addresses: Address) -> list[Address]:
    return asyncio.run(Names(addresses).look_up())


def test_a_name_is_each_of_its_addresses() -> None:
    """What getaddrinfo says of localhost; an address that is no name stands for itself."""
    told = {str(where[0]) for *_, where in socket.getaddrinfo("localhost", 8001, type=socket.SOCK_STREAM)}
    expected = {f"[{one}]:8001" if ":" in one else f"{one}:8001" for one in told}
    found = looked_up(Address("dns:///localhost:8001"), Address("127.0.0.1:9001"))
    assert {one.url for one in found} == expected | {"127.0.0.1:9001"}


def test_a_certificate_is_for_the_name() -> None:
    (found, *_) = looked_up(Address("dns:///localhost:8001", ca="ca.pem"))
    assert found.authority == "localhost"
    (found, *_) = looked_up(Address("dns:///localhost:8001", ca="ca.pem", authority="triton.example"))
    assert found.authority == "triton.example"


def test_a_name_that_cannot_be_looked_up_is_what_it_last_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice() -> tuple[list[Address], list[Address]]:
        names = Names([Address("dns:///localhost:8001")])
        before = await names.look_up()

        def fails(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        monkeypatch.setattr(socket, "getaddrinfo", fails)
        return before, await names.look_up()

    before, after = asyncio.run(twice())
    assert before == after != []


@pytest.mark.parametrize("url", ["dns:///", "dns:///host", "dns:///host:", "dns:///:1", "dns:///host:0", "dns:host:1"])
def test_what_is_no_name_is_refused(url: str) -> None:
    done = minitron("gateway", "--upstream", url, "--repository", SMALL_MODEL, check=False)
    assert done.returncode == 2 and "dns:///NAME:PORT" in done.stderr


def test_the_figures_of_a_stream() -> None:
    """Two tokens, then four at once: one first token, one time between, six tokens, and nobody waits."""
    metrics = Metrics()
    timing = metrics.timing()
    assert "minitron_gateway_sequences_waiting 1.0" in metrics.text().decode()
    timing.came(2)
    timing.came(0)
    timing.came(4)
    timing.end()
    metrics.timing().end()  # one that was failed before its first token
    lines = metrics.text().decode().splitlines()
    for expected in (
        "minitron_gateway_generated_tokens_total 6.0", "minitron_gateway_time_to_first_token_seconds_count 1.0",
        "minitron_gateway_inter_token_latency_seconds_count 1.0", "minitron_gateway_sequences_waiting 0.0",
    ):  # fmt: skip
        assert expected in lines


@pytest.mark.slow
def test_a_name_without_a_server_is_not_ready(tmp_path: Path) -> None:
    gateway = Gateway("--upstream", "dns:///localhost:1", "--repository", _repository(tmp_path))
    try:
        assert within(10, lambda: b'upstream_ready{upstream="127.0.0.1:1"} 0.0' in gateway.get("/metrics")[1])
        assert gateway.get("/health/ready")[0] == 503
    finally:
        gateway.end()


def _repository(folder: Path) -> Path:
    import hand_made

    return hand_made.echo_repository(folder)
