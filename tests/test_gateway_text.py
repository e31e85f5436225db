"""The gateway over the real server: its text is the text model's, character for character.

The judge of texts is ``tensorrt_llm_bls`` asked by tritonclient, of ids the tokenizer's own decode, of a ``seed`` the
CPU engine through the text model with the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer

from conftest import SMALL_MODEL
from gateway_process import Gateway, within
from serving import Stream, text_of

pytestmark = pytest.mark.server

BLS = "tensorrt_llm_bls"
PROMPT = "In the beginning God created"


@pytest.fixture(scope="module")
def echoing(echo_server: dict[str, Any]) -> Iterator[Gateway]:
    """A gateway to the engine that says its prompt again and again."""
    one = Gateway("--upstream", echo_server["urls"]["grpc"])
    yield one
    assert one.end()[0] == 0


@pytest.fixture
def text_model(server: dict[str, Any]) -> Iterator[Stream]:
    one = Stream(server["urls"]["grpc"])
    yield one
    one.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))


def prompts() -> list[str]:
    """200 texts: emoji of several code points, characters of bytes, spaces at the borders, tabs and lines."""
    parts = [
        "the quick",
        " brown",
        "fox ",
        "\U0001f600\U0001f1e9\U0001f1ea",
        "é",
        "日本",
        "☃",
        "\t",
        "\n",
        "  ",
        "x",
        "ß—“”",
    ]
    return ["".join(parts[(number * step + 3 * step) % len(parts)] for step in range(1, 2 + number % 6)) + str(number)
            for number in range(200)]  # fmt: skip


def test_two_hundred_texts_are_the_text_model_s_streamed_and_whole(
    echo_server: dict[str, Any], echoing: Gateway
) -> None:
    def one(prompt: str) -> None:
        own = Stream(echo_server["urls"]["grpc"])
        expected = text_of(own.responses(BLS, text_input=prompt, max_tokens=20))
        own.close()
        document = echoing.complete(prompt, max_tokens=20, temperature=0)
        assert document["choices"][0]["text"] == expected
        assert "".join(echoing.texts(prompt, max_tokens=20, temperature=0)) == expected

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, prompts()))


@pytest.mark.parametrize("stop", ["pped h", ["zz", "here"], [" now", "the st"]])
def test_a_stop_string_ends_text_and_count_the_same_in_every_way(
    echo_server: dict[str, Any], echoing: Gateway, stop: str | list[str]
) -> None:
    own = Stream(echo_server["urls"]["grpc"])
    words = [stop] if isinstance(stop, str) else stop
    expected = text_of(own.responses(BLS, text_input="the stopped here now", max_tokens=40, stop_words=words))
    own.close()
    asked: dict[str, Any] = {"max_tokens": 40, "stop": stop, "temperature": 0}
    whole = echoing.complete("the stopped here now", **asked)
    assert whole["choices"][0]["text"] == expected
    assert whole["choices"][0]["finish_reason"] == "stop"
    with echoing.stream("the stopped here now", **asked, stream_options={"include_usage": True}) as stream:
        documents = [document for _, document in stream]
    assert "".join(one["choices"][0]["text"] for one in documents[:-1]) == expected
    assert documents[-2]["choices"][0]["finish_reason"] == "stop"
    assert documents[-1]["choices"] == [] and documents[-1]["usage"] == whole["usage"]
    assert all(one["usage"] is None for one in documents[:-1])


def test_greedy_text_and_counts_are_the_engine_s(gateway: Gateway, text_model: Stream, tokenizer: Tokenizer) -> None:
    (expected,) = text_model.responses(
        BLS, text_input=PROMPT, max_tokens=24, return_num_output_tokens=True, return_num_input_tokens=True
    )
    document = gateway.complete(PROMPT, max_tokens=24, temperature=0)
    (choice,) = document["choices"]
    assert choice["text"] == expected["text_output"][0].decode()
    assert choice["finish_reason"] == "length"
    made, read = expected["num_output_tokens"].item(), expected["num_input_tokens"].item()
    assert document["usage"] == {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    assert gateway.complete(ids, max_tokens=24, temperature=0)["choices"] == document["choices"]
    assert gateway.complete(PROMPT, max_tokens=24, top_p=0)["choices"] == document["choices"]


def test_a_seed_gives_what_it_gives_in_the_text_model(gateway: Gateway, text_model: Stream) -> None:
    expected = text_model.responses(BLS, text_input=PROMPT, max_tokens=16, seed=7, top_p=1.0, temperature=0.9)
    asked: dict[str, Any] = {"max_tokens": 16, "seed": 7, "temperature": 0.9}
    assert gateway.complete(PROMPT, **asked)["choices"][0]["text"] == text_of(expected)
    assert "".join(gateway.texts(PROMPT, **asked)) == text_of(expected)
    cut = text_model.responses(
        BLS, text_input=PROMPT, max_tokens=16, seed=7, top_p=0.8, top_k=5, repetition_penalty=1.3
    )
    more = {"seed": 7, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.3}
    assert gateway.complete(PROMPT, max_tokens=16, **more)["choices"][0]["text"] == text_of(cut)


def test_without_a_seed_answers_differ(gateway: Gateway) -> None:
    found = {gateway.complete(PROMPT, max_tokens=16, temperature=1.5)["choices"][0]["text"] for _ in range(4)}
    assert len(found) > 1


def test_several_prompts_and_choices_keep_their_places(gateway: Gateway, tokenizer: Tokenizer) -> None:
    texts = [PROMPT, "And the LORD said", "Behold"]
    asked: dict[str, Any] = {"max_tokens": 8, "seed": 3, "n": 2}
    alone = [gateway.complete(text, **asked)["choices"] for text in texts]
    expected = [choice["text"] for choices in alone for choice in choices]
    assert len(set(expected)) == 6  # each further choice has the next seed
    assert expected[1] == gateway.complete(PROMPT, max_tokens=8, seed=4)["choices"][0]["text"]
    document = gateway.complete(texts, **asked)
    assert [choice["text"] for choice in document["choices"]] == expected
    assert [choice["index"] for choice in document["choices"]] == list(range(6))
    assert document["usage"]["completion_tokens"] == 48
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert document["usage"]["prompt_tokens"] == sum(map(len, rows))
    assert gateway.complete(rows, **asked)["choices"] == document["choices"]
    streamed = [""] * 6
    with gateway.stream(texts, **asked) as stream:
        for _, one in stream:
            streamed[one["choices"][0]["index"]] += one["choices"][0]["text"]
    assert streamed == expected


def test_echo_puts_the_prompt_before_its_answers(gateway: Gateway, text_model: Stream) -> None:
    expected = text_of(text_model.responses(BLS, text_input=PROMPT, max_tokens=6, exclude_input_in_output=False))
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "echo": True}
    assert gateway.complete(PROMPT, **asked)["choices"][0]["text"] == expected
    assert "".join(gateway.texts(PROMPT, **asked)) == expected


def test_log_probs_are_the_engine_s_and_their_tokens_make_the_text(gateway: Gateway, text_model: Stream) -> None:
    (expected,) = text_model.responses(BLS, text_input=PROMPT, max_tokens=10, return_log_probs=True)
    (choice,) = gateway.complete(PROMPT, max_tokens=10, temperature=0, logprobs=1)["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(expected["output_log_probs"].reshape(-1).tolist(), abs=1e-4)
    assert "".join(found["tokens"]) == choice["text"]
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:place]) for place in range(10)]
    pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
    assert found["top_logprobs"] == [{token: log_prob} for token, log_prob in pairs]
    streamed: list[float] = []
    with gateway.stream(PROMPT, max_tokens=10, temperature=0, logprobs=0) as stream:
        for _, one in stream:
            streamed += (one["choices"][0]["logprobs"] or {"token_logprobs": []})["token_logprobs"]
    assert streamed == pytest.approx(found["token_logprobs"], abs=1e-4)


def test_best_of_are_those_with_the_highest_mean_log_prob(gateway: Gateway) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "seed": 11, "temperature": 1.5}
    every = gateway.complete(PROMPT, n=4, logprobs=0, **asked)["choices"]
    means = {
        one["text"]: math.fsum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"]) for one in every
    }
    best = gateway.complete(PROMPT, n=2, best_of=4, **asked)
    assert [one["text"] for one in best["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert all(one["logprobs"] is None for one in best["choices"])
    assert best["usage"]["completion_tokens"] == 24  # what was made, not what was chosen


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logit_bias": {"300": 5}}, "embedding_bias has values: that is not supported by the CPU engine"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5: that is not supported by the CPU engine"),
        ({"max_tokens": 100_000}, "max_seq_len"),
        ({"max_tokens": 4, "min_tokens": 9}, "min_tokens is 9: it must be from 0 to"),
    ],
)
def test_what_engine_and_limits_refuse_is_a_400_with_their_sentence(
    gateway: Gateway, options: dict[str, Any], told: str
) -> None:
    status, message = gateway.refusal(PROMPT, **options)
    assert status == 400 and told in message
    assert "Executor" not in message


def test_min_tokens_and_ignore_eos_are_the_engine_s(gateway: Gateway) -> None:
    """``test_model_repo_cpu_engine`` has the meaning of both; here: that they arrive there."""
    more = {"max_tokens": 40, "temperature": 0}
    assert gateway.complete(PROMPT, ignore_eos=True, min_tokens=40, **more)["usage"]["completion_tokens"] == 40


def test_a_client_that_leaves_ends_its_request_in_the_engine(echo_server: dict[str, Any], echoing: Gateway) -> None:
    steps = echo_server["steps"]
    before = len(steps.read_text().splitlines()) if steps.exists() else 0
    # This engine's temperature is milliseconds a step: 1900 steps of 2 ms.
    with echoing.stream("the quick brown", max_tokens=1900, temperature=2) as stream:
        next(stream)
    assert within(20, lambda: len(steps.read_text().splitlines()) > before)
    note = steps.read_text().splitlines()[-1]
    assert '"stopped": true' in note
    assert within(10, lambda: echoing.metric("minitron_gateway_streams") == 0)
    assert echoing.metric("minitron_gateway_clients_left_total") == 1
