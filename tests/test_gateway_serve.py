"""``serve --openai``: the endpoint lives as long as its server, and no accepted stream is lost at the end.

The engine says its prompt again (doubles/echo_engine.py), so every text is known beforehand.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hand_made
from conftest import minitron
from gateway_process import events, within
from supervisor import FREE, command_lines, nothing_is_left

pytestmark = [pytest.mark.server, pytest.mark.slow]


def post(url: str, body: dict[str, Any], *, key: str = "") -> Any:
    """An open answer; the certificate is not what these tests are about."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "minitron", **body}).encode(), headers
    )
    context = ssl._create_unverified_context() if url.startswith("https") else None
    return urllib.request.urlopen(request, timeout=60, context=context)


def gateways(mark: str) -> list[int]:
    return [pid for pid, words in command_lines(" gateway --listen ").items() if mark in words]


def test_it_lives_and_ends_with_its_server(tmp_path: Path, serve: Callable[..., Any]) -> None:
    repository = hand_made.echo_repository(tmp_path / "echo")
    one = serve(repository, "--openai", "0")
    url = f"http://{one.document['urls']['openai']}"
    short = {"prompt": "the quick", "max_tokens": 4, "temperature": 0}
    assert json.load(post(url, short))["choices"][0]["text"] == " the quick the quick"
    (first,) = gateways(str(repository))
    os.kill(first, signal.SIGKILL)

    def is_back() -> bool:
        try:
            return bool(json.load(post(url, short))["choices"])
        except (OSError, urllib.error.HTTPError):
            return False

    assert within(60, is_back)
    assert gateways(str(repository)) != [first]
    # This engine's temperature is milliseconds a step: two seconds of stream, in whose middle all is asked to stop.
    stream = events(post(url, {"prompt": "the quick brown", "max_tokens": 999, "temperature": 2, "stream": True}))
    texts = [next(stream)[1]["choices"][0]["text"]]
    one.send(signal.SIGTERM)
    texts += [document["choices"][0]["text"] for _, document in stream]  # which fails without [DONE]
    assert "".join(texts) == " the quick brown" * 333
    code, said = one.end()
    assert code == 0, said
    assert f"OpenAI's API: {url}/v1\n" in said  # a URL to be pasted
    http, metrics = (f"http://{one.document['urls'][name]}" for name in ("http", "metrics"))
    assert f"and on {http}, metrics on {metrics}/metrics;" in said
    assert nothing_is_left(one.mark) and not gateways(str(repository))


def test_keys_and_tls_of_the_server_are_those_of_the_endpoint(
    tmp_path: Path, serve: Callable[..., Any], certificates: Path
) -> None:
    (tmp_path / "key").write_text("a-key-of-sixteen-letters\n")
    (tmp_path / "key").chmod(0o600)
    tls = ("--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key")
    repository = hand_made.echo_repository(tmp_path / "echo")
    one = serve(repository, "--openai", "0", "--api-key-file", tmp_path / "key", *tls)
    url = f"https://{one.document['urls']['openai']}"
    short = {"prompt": "the quick", "max_tokens": 4, "temperature": 0}
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, short)
    assert refused.value.code == 401
    found = json.load(post(url, short, key="a-key-of-sixteen-letters"))
    assert found["choices"][0]["text"] == " the quick the quick"
    one.send(signal.SIGTERM)
    assert f"OpenAI's API: {url}/v1\n" in one.end()[1]


def test_a_port_that_is_taken_is_said_and_leaves_nothing(tmp_path: Path, echo_server: dict[str, Any]) -> None:
    repository = hand_made.echo_repository(tmp_path / "echo")
    taken = echo_server["urls"]["http"].rpartition(":")[2]
    done = minitron("serve", repository, *FREE, "--state", tmp_path / "state", "--openai", taken, check=False)
    assert done.returncode == 7
    assert f"the OpenAI endpoint did not start: 127.0.0.1:{taken} cannot be listened on" in done.stderr.splitlines()[-1]
    assert not command_lines(str(tmp_path))


def test_a_repository_without_the_text_model_has_no_endpoint(tmp_path: Path, echo: Path) -> None:
    done = minitron("serve", echo, *FREE, "--state", tmp_path / "state", "--openai", "0", check=False)
    assert done.returncode == 2 and "--openai needs the text model" in done.stderr
