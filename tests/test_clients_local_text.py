"""The client with a tokenizer of its own, over ``tensorrt_llm`` of a real server: what the text model says, it says.

The judge is ``tensorrt_llm_bls``, asked by tritonclient; test_gateway_text.py has two hundred texts of both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SMALL_MODEL, minitron
from gateway_process import within
from minitron.errors import InputError, InvalidRequest, UsageError
from minitron_client.client import AsyncClient, Client, Request
from serving import Stream, text_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

BLS = "tensorrt_llm_bls"
PROMPT = "In the beginning God created"


@pytest.fixture
def text_model(server: dict[str, Any]) -> Iterator[Stream]:
    one = Stream(server["urls"]["grpc"])
    yield one
    one.close()


@pytest.fixture
def client(server: dict[str, Any]) -> Iterator[Client]:
    with Client(server["urls"]["grpc"], tokenizer=SMALL_MODEL) as one:
        yield one


def echo_tokenizer(echo_server: dict[str, Any]) -> Path:
    return Path(echo_server["steps"]).parent.parent / "tokenizer"


def test_a_stop_string_ends_answer_and_request_wherever_it_stands(echo_server: dict[str, Any]) -> None:
    """The engine of this server would go on for 1900 tokens, 2 ms each (its temperature)."""
    steps = Path(echo_server["steps"])
    url = echo_server["urls"]["grpc"]
    asked: dict[str, Any] = {"max_tokens": 1900, "stop_words": ["ick br"], "temperature": 2.0}
    own = Stream(url)
    expected = text_of(own.responses(BLS, text_input="the quick brown", **asked))
    own.close()
    before = len(steps.read_text().splitlines())
    with Client(url, tokenizer=echo_tokenizer(echo_server)) as client:
        whole = client.generate("the quick brown", **asked)
        with client.stream("the quick brown", **asked) as stream:
            texts = [chunk.text for chunk in stream]
        assert whole.text == "".join(texts) == expected
        assert whole.finish_reason == stream.response.finish_reason == "stop"

    async def asynchronous() -> str:
        async with AsyncClient(url, tokenizer=echo_tokenizer(echo_server)) as one:
            return "".join([chunk.text async for chunk in one.stream("the quick brown", **asked)])

    assert asyncio.run(asynchronous()) == expected
    assert within(20, lambda: len(steps.read_text().splitlines()) >= before + 3)
    assert all('"stopped": true' in line for line in steps.read_text().splitlines()[before:])


def test_counts_log_probs_and_choices_are_the_engine_s(client: Client, text_model: Stream) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "return_log_probs": True}
    (expected,) = text_model.responses(BLS, text_input=PROMPT, **asked)
    found = client.generate(PROMPT, **asked)
    assert found.text == expected["text_output"][0].decode() and found.finish_reason == "length"
    assert found.outputs[0].log_probs == pytest.approx(expected["output_log_probs"].reshape(-1).tolist(), abs=1e-4)
    assert (found.token_count, found.input_token_count) == (8, 11)
    assert found.timing.ttft_ns is None  # a whole answer tells none
    several: dict[str, Any] = {"max_tokens": 6, "num_return_sequences": 3, "top_k": 40, "temperature": 1.3, "seed": 5}
    parts = text_model.responses(BLS, text_input=PROMPT, **several)
    texts = {int(part["sequence_index"][0, 0]): part["text_output"][0].decode() for part in parts}
    assert [one.text for one in client.generate(PROMPT, **several).outputs] == [texts[place] for place in range(3)]


def test_what_cannot_be_is_said_before_it_is_sent(client: Client, server: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="was not sent: the prompt's 11 tokens and 5000 new ones are more"):
        client.generate(PROMPT, max_tokens=5000)
    with pytest.raises(InvalidRequest, match=r"takes text \(prompt\)"):
        client.generate(Request(input_ids=[5, 6], max_tokens=5))
    with pytest.raises(InvalidRequest, match="no input for no_repeat_ngram_size"):
        client.generate(PROMPT, no_repeat_ngram_size=3)
    with (
        Client(server["urls"]["grpc"], tokenizer=SMALL_MODEL, model=BLS) as wrong,
        pytest.raises(UsageError, match="takes text"),
    ):
        wrong.generate(PROMPT)
    with (
        Client(server["urls"]["grpc"], tokenizer=tmp_path) as nothing,
        pytest.raises(InputError, match="holds no tokenizer"),
    ):
        nothing.generate(PROMPT)


def test_the_command_makes_text_here(server: dict[str, Any], text_model: Stream) -> None:
    expected = text_of(text_model.responses(BLS, text_input=PROMPT, max_tokens=12))
    words = ("generate", PROMPT, "--max-tokens", "12", "--url", server["urls"]["grpc"], "--tokenizer", SMALL_MODEL)
    for more in ((), ("--no-stream",)):
        done = minitron(*words, *more)
        assert done.stdout == expected + "\n"
        assert "12 tokens" in done.stderr and "model tensorrt_llm" in done.stderr
