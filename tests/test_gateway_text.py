"""The gateway over the real server: its text is the text model's, character for character, and the client's own.

The judge of texts is ``tensorrt_llm_bls`` asked by tritonclient, of where a stop string cuts one ``str.find``, of ids
the tokenizer's own decode, of a ``seed`` the CPU engine through the text model with the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from conftest import SMALL_MODEL
from gateway_process import Gateway, within
from minitron_client.client import Client
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


def stops(number: int, text: str) -> list[str]:
    """Of every other prompt parts of its answer, wherever they stand: one, or several of one length, of which the
    later is named first, beside one that never comes. Of those of one length the first to begin is the first to end.
    """
    size = 1 + number // 4 % 5
    start = number * 7 % max(len(text) - 2 * size, 1)
    first, later = text[start : start + size], text[start + size + 1 : start + 2 * size + 1]
    several = [text[-1:] + "never" + text[:1], *[later] * (len(later) == size), first]
    return [[], [first], [], several][number % 4]


def pieces_of(tokenizer: Tokenizer, prompt: str, count: int) -> list[str]:
    """What each token adds to the text of an engine that says ``prompt`` again and again."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    said = [tokenizer.decode(ids + (ids * count)[:length]) for length in range(count + 1)]
    return [new.removeprefix(old) for old, new in pairwise(said)]


def test_two_hundred_texts_are_one_in_every_way_streamed_and_whole(
    echo_server: dict[str, Any], echoing: Gateway
) -> None:
    folder, url = Path(echo_server["steps"]).parent.parent / "tokenizer", echo_server["urls"]["grpc"]
    judge = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def one(case: tuple[int, str]) -> set[str]:
        """All ways with one prompt; where its stop strings stand."""
        number, prompt = case
        own = Stream(url)
        plain = text_of(own.responses(BLS, text_input=prompt, max_tokens=20))
        words = [word for word in stops(number, plain) if word]
        more: dict[str, Any] = {"stop_words": words} if words else {}
        expected = plain[: min([place for place in map(plain.find, words) if place >= 0], default=len(plain))]
        for streams in (False, True):
            asked: dict[str, Any] = {"text_input": prompt, "max_tokens": 20, **more}
            assert text_of(own.responses(BLS, stream=streams, **asked)) == expected
        own.close()
        assert client.generate(prompt, max_tokens=20, **more).text == expected
        assert "".join(chunk.text for chunk in client.stream(prompt, max_tokens=20, **more)) == expected
        openai: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "stop": words}
        document = echoing.complete(prompt, **openai)
        assert document["choices"][0]["text"] == expected
        assert "".join(echoing.texts(prompt, **openai)) == expected
        borders = {0, *accumulate(map(len, pieces_of(judge, prompt, 20)))}
        found: set[str] = set()
        for start, end in ((plain.find(word), plain.find(word) + len(word)) for word in words if word in plain):
            found |= {"over a border"} if borders & set(range(start + 1, end)) else set()
            found |= {"inside a token"} if not borders & set(range(start, end + 1)) else set()
        return found | ({"several"} if len(words) > 2 else set())

    with Client(url, tokenizer=folder) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(one, enumerate(prompts())))
    for kind in ("over a border", "inside a token", "several"):
        assert sum(kind in one for one in found) >= 10, kind


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
        ({"logit_bias": {"300": 5}}, "logit_bias has values: that is not supported by the CPU engine"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5: that is not supported by the CPU engine"),
        ({"frequency_penalty": -0.5}, "frequency_penalty is -0.5: that is not supported by the CPU engine"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty is 1e-30: it must be from 1e-28 to 1e+28"),
        ({"logit_bias": {"5000": 5}}, "logit_bias has the token id 5000"),
        ({"max_tokens": 100_000}, "max_seq_len"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens: 9 is more than the 4 tokens that may come (max_tokens)"),
    ],
)
def test_what_engine_and_limits_refuse_is_a_400_in_openai_s_words(
    gateway: Gateway, options: dict[str, Any], told: str
) -> None:
    status, document, _ = gateway.ask("/v1/completions", {"model": "minitron", "prompt": PROMPT, **options})
    assert status == 400 and told in document["error"]["message"]
    assert "Executor" not in document["error"]["message"]
    assert document["error"]["param"] == (None if "max_seq_len" in told else next(iter(options)))


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
