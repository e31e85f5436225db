"""SIGTERM under load, to a server, to a gateway, and to both in either order: accepted streams end whole, new requests
are told 503, and where another server is there, it takes them.

Two real servers, whose engine says its prompt again (doubles/echo_engine.py), so that every text is known beforehand:
``leaving``, which is told to end, and ``staying``. One gateway has the leaving server alone, the other has both.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import hand_made
from gateway_process import Gateway, within

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROMPT = "the quick brown"
#: Seconds of stream: this engine's temperature is milliseconds a step.
LONG: dict[str, Any] = {"max_tokens": 1899, "temperature": 2}
SHORT: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
STREAMS = 6


class Load:
    """Streams that run through a gateway, each to its end: ``texts`` are what they gave."""

    def __init__(self, gateway: Gateway) -> None:
        self._begun = threading.Semaphore(0)
        self._threads = ThreadPoolExecutor(STREAMS)
        self._running = [self._threads.submit(self._one, gateway) for _ in range(STREAMS)]

    def _one(self, gateway: Gateway) -> str:
        with gateway.stream(PROMPT, **LONG) as stream:
            texts = [next(stream)[1]["choices"][0]["text"]]
            self._begun.release()
            return "".join([*texts, *(one["choices"][0]["text"] for _, one in stream)])  # which fails without [DONE]

    def wait_until_accepted(self) -> None:
        assert all(self._begun.acquire(timeout=60) for _ in range(STREAMS))

    @property
    def runs(self) -> bool:
        return not any(map(Future.done, self._running))

    def texts(self) -> list[str]:
        return [one.result(timeout=120) for one in self._running]


def new_one(gateway: Gateway) -> int:
    """The status of one new request, whose answer must be whole or refused in OpenAI's shape."""
    status, document, headers = gateway.ask("/v1/completions", {"model": "minitron", "prompt": PROMPT, **SHORT})
    if status == 200:
        assert document["choices"][0]["text"] == " the quick brown" * 2
    else:
        assert document["error"]["type"] == "service_unavailable" and headers["retry-after"] == "1", document
    return status


@pytest.mark.parametrize(
    "order", [("server",), ("gateway",), ("server", "gateway"), ("gateway", "server")], ids="-".join
)
def test_accepted_streams_end_whole_and_new_requests_go_elsewhere(
    order: tuple[str, ...], serve: Callable[..., Any], echo_server: dict[str, Any], tmp_path: Path
) -> None:
    leaving = serve(hand_made.echo_repository(tmp_path / "echo"), "--exit-timeout", "60")
    alone = Gateway("--upstream", leaving.url, "--drain-timeout", "60")
    both = Gateway("--upstream", leaving.url, "--upstream", echo_server["urls"]["grpc"])
    loads = [Load(alone), Load(both)]
    for load in loads:
        load.wait_until_accepted()
    for who in order:
        (leaving.process if who == "server" else alone.process).send_signal(signal.SIGTERM)
    # Until the signal has arrived a request may still be taken, and is then answered whole.
    assert within(30, lambda: new_one(alone) == 503)
    assert [new_one(both) for _ in range(2 * STREAMS)] == [200] * 2 * STREAMS
    assert alone.get("/health/ready")[0] == 503 and both.get("/health/ready")[0] == 200
    assert loads[0].runs, "the streams were over before the end of the server or gateway was looked at"
    for load in loads:
        assert load.texts() == [" the quick brown" * 633] * STREAMS
    if "server" in order:
        code, said = leaving.end()
        assert code == 0, said
    for gateway in (alone, both):
        code, said = gateway.end()
        assert code == 0 and "Traceback" not in said
