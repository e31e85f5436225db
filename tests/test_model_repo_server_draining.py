"""A drain does not wait for ever for requests that Triton holds and no model works on.

Triton 2.51 was seen to keep those whose clients cancelled while their last response was written. Here a server's place
is taken by what a drain sees of one: the page of its metrics, in Prometheus' text format, and a log in which no model
ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron.errors import NotDrained
from minitron_triton.server import draining
from minitron_triton.server.draining import Drain
from minitron_triton.server.launch import Served

pytestmark = pytest.mark.slow

IDLE = """\
minitron_text_requests{model="tensorrt_llm_bls"} 0
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 0
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 16
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 0
"""


@pytest.fixture
def page() -> Iterator[dict[str, str]]:
    """A server of metrics: ``text`` is what it says, ``url`` where."""
    told = {"text": IDLE}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told["text"].encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told["url"] = f"127.0.0.1:{server.server_port}"
        yield told
        server.shutdown()


def drain(page: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """A drain of a server whose models never end, with a third of a second of nothing and two seconds in all."""
    monkeypatch.setattr(draining, "_NOTHING_S", 0.3)
    monkeypatch.setattr(draining, "_COUNT_S", 0.05)
    monkeypatch.setattr(draining, "GRACE_S", 1)
    log = SimpleNamespace(ended=set(), offset=0, path=tmp_path / "log")
    running: Any = SimpleNamespace(log=log, child=SimpleNamespace(poll=lambda: None), mark="no-server", lost=lambda: [])
    control: Any = SimpleNamespace(log_verbosely=lambda *, verbose: None, unload=lambda model: None)
    served = Served(tmp_path, "python", ("tensorrt_llm_bls", "tensorrt_llm"), "tensorrt_llm_bls", tmp_path, 1, None, 0)
    return Drain(running, served, control, 1, lambda: False, metrics=page["url"]).run()


def test_what_no_model_works_on_is_not_waited_for(
    page: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert drain(page, monkeypatch, tmp_path)
    assert caplog.text.count("requests that no model works on") == 1


@pytest.mark.parametrize(
    "text",
    [
        IDLE.replace('bls"} 0', 'bls"} 1'), IDLE.replace('"active",version="1"} 0', '"active",version="1"} 2'),
        IDLE.replace('"waiting",version="1"} 0', '"waiting",version="1"} 1'),
        IDLE.partition("\n")[2],  # a text model that does not say
        IDLE.partition("\n")[0] + "\n",  # an engine that does not
        "", "<html>",
    ],
)  # fmt: skip
def test_what_a_model_works_on_or_does_not_tell_of_is(
    page: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    page["text"] = text
    with pytest.raises(NotDrained):
        drain(page, monkeypatch, tmp_path)
