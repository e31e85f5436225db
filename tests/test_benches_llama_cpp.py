"""The compiled llama.cpp as a side of ``make bench-cpu``, with a server that answers as llama-server 11434 was seen to.

Its stream (tools/server/README.md, POST /completion): an event for each token, the last with ``stop`` and ``timings``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from llama_cpp_side import Native, context_tokens
from process_memory import MemoryWatch
from tokenizers import Tokenizer

from conftest import SMALL_MODEL


class Handler(BaseHTTPRequestHandler):
    """Says "a" as often as it is asked to; the prompt's tokens come from the cache where the class says so."""

    asked: ClassVar[list[Any]] = []
    cached = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(body["n_predict"]):
            self.event({"content": "a", "tokens": [5], "stop": False})
        timings = {"cache_n": self.cached, "prompt_n": len(body["prompt"]) - self.cached}
        self.event({"content": "", "stop": True, "timings": timings | {"predicted_n": body["n_predict"]}})

    def event(self, document: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def side() -> Iterator[Native]:
    Handler.asked, Handler.cached = [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Native(server.server_port, SMALL_MODEL, MemoryWatch(0))
    server.shutdown()
    thread.join()
    server.server_close()


def test_prompts_go_as_ids_and_tokens_are_the_servers_count(side: Native) -> None:
    prompts = ["In the beginning", "And the earth"]
    done = side.ask(prompts, 7)
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    sent = sorted(body["prompt"] for _, body in Handler.asked)
    assert sent == sorted(tokenizer.encode(text, add_special_tokens=False).ids for text in prompts)
    assert all(path == "/completion" for path, _ in Handler.asked)
    settings = {key: Handler.asked[0][1][key] for key in ("n_predict", "ignore_eos", "temperature", "cache_prompt")}
    assert settings == {"n_predict": 7, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    assert done["tokens"] == 14 and 0 < done["ttft_s"] <= done["seconds"]


def test_a_prompt_that_came_from_the_cache_is_no_measurement(side: Native) -> None:
    Handler.cached = 1
    with pytest.raises(AssertionError, match="cache_n"):
        side.ask(["In the beginning"], 2)


def test_the_context_has_room_for_every_slot() -> None:
    # llama.cpp rounds a slot up to 256 tokens: 576 become 768.
    assert context_tokens(16, 576) == 16 * 768
