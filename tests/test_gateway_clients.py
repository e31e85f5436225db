"""Other people's clients against the gateway over the real server: OpenAI's for Python, and curl.

They run as programs of their own, OpenAI's client in an environment of its own (``make test-clients``, which names its
Python in CLIENTS_PYTHON). The judge of texts is the text model, asked by tritonclient.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bare_process import Bare, prompt
from conftest import SMALL_MODEL
from gateway_process import Gateway
from serving import Stream, text_of

pytestmark = [pytest.mark.clients, pytest.mark.server]

PROMPT = "In the beginning God created"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def gateway(server: dict[str, Any]) -> Iterator[Gateway]:
    one = Gateway("--upstream", server["urls"]["grpc"])
    yield one
    assert one.end()[0] == 0


@pytest.fixture(scope="module")
def expected(server: dict[str, Any]) -> str:
    own = Stream(server["urls"]["grpc"])
    text = text_of(own.responses("tensorrt_llm_bls", text_input=PROMPT, max_tokens=12))
    own.close()
    return text


def run(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def openai_client(*words: str) -> Any:
    return json.loads(run(os.environ["CLIENTS_PYTHON"], HERE / "openai_client.py", *words))


def test_openai_s_client_gets_the_text_in_every_way_and_raises_what_it_should(gateway: Gateway, expected: str) -> None:
    found = openai_client(gateway.document["url"])
    assert found["models"] == ["minitron"]
    for way in ("whole", "tokens", "streamed", "async", "extra"):
        assert found[way] == expected, way
    assert found["finish"] == "length"
    assert found["usage"]["completion_tokens"] == found["streamed_usage"] == 12
    assert found["chat"][:2] == ["BadRequestError", 400] and "/v1/completions" in found["chat"][2]
    assert found["no_model"][:2] == ["NotFoundError", 404]
    assert found["too_long"][:2] == ["BadRequestError", 400]


def test_openai_s_client_raises_when_a_stream_breaks_and_passes_over_comments(tmp_path: Path) -> None:
    server = Bare(tmp_path, "--tokenizer", str(SMALL_MODEL))
    gateway = Gateway("--upstream", server.url, "--sse-keep-alive", "0.2")
    try:
        found = openai_client(gateway.document["url"], prompt(error="it broke", error_after=3, interval_ms=800))
        assert found["error"][0] == "APIError" and "it broke" in found["error"][2]
        assert found["text"]
    finally:
        gateway.end()
        server.end()


def test_curl_gets_an_answer_and_a_stream(gateway: Gateway, expected: str) -> None:
    url = gateway.document["url"] + "/completions"
    body = {"model": "minitron", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = run("curl", "-sS", "--fail", url, "-d", json.dumps(body))
    assert json.loads(whole)["choices"][0]["text"] == expected
    lines = run("curl", "-sSN", "--fail", url, "-d", json.dumps(body | {"stream": True})).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == expected
