"""Chat with a tokenizer that has a template, and bodies of any kind.

The judge of a conversation's text is the template, written out by hand here; the server notes the ids that it was sent.
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bare_process import Bare
from conftest import SMALL_MODEL
from gateway_process import Gateway, events

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A server whose tokenizer is the small Minitron's, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(SMALL_MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    one = Bare(tmp_path_factory.mktemp("bare"), "--tokenizer", str(folder))
    yield one
    one.end()


@pytest.fixture(scope="module")
def gateway(upstream: Bare) -> Iterator[Gateway]:
    one = Gateway("--upstream", upstream.url)
    yield one
    code, said = one.end()
    assert code == 0 and "Traceback" not in said and "failed" not in said


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you"}]},
]


def chat(gateway: Gateway, messages: Any = CONVERSATION, **options: Any) -> tuple[int, Any]:
    body = {"model": "minitron", "messages": messages, **options}
    status, document, _ = gateway.ask("/v1/chat/completions", body)
    return status, document


def test_a_conversation_is_written_by_the_template(upstream: Bare, gateway: Gateway) -> None:
    status, document = chat(gateway, max_completion_tokens=4, temperature=0)
    assert status == 200
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    expected = tokenizer.encode("system: Be kind.\nuser: Hello, you\nassistant:", add_special_tokens=False).ids
    assert upstream.events("request")[-1]["inputs"]["input_ids"] == expected
    (choice,) = document["choices"]
    assert document["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    lead = tokenizer.encode("x", add_special_tokens=False).ids
    assert choice["message"]["content"] == tokenizer.decode([*lead, *range(300, 304)]).removeprefix("x")
    assert document["usage"]["prompt_tokens"] == len(expected)


def test_a_stream_s_deltas_are_the_whole_answer(gateway: Gateway) -> None:
    _, whole = chat(gateway, max_tokens=8, logprobs=True)
    body = {"model": "minitron", "messages": CONVERSATION, "max_tokens": 8, "stream": True, "logprobs": True}
    connection = gateway.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    documents = [document for _, document in events(connection.getresponse())]
    connection.close()
    choices = [document["choices"][0] for document in documents]
    assert {document["object"] for document in documents} == {"chat.completion.chunk"}
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert (
        "".join(choice["delta"].get("content", "") for choice in choices) == (whole["choices"][0]["message"]["content"])
    )
    assert choices[-1]["finish_reason"] == "length"
    found = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert found == whole["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in found] == [-0.5] * 8
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in found)


def test_without_a_limit_the_answer_may_fill_what_is_left(upstream: Bare, gateway: Gateway) -> None:
    _, document = chat(gateway)
    asked = upstream.events("request")[-1]["inputs"]["request_output_len"]
    assert asked == 20_000 - document["usage"]["prompt_tokens"]  # the double's max_seq_len
    assert document["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("messages", "options", "told"),
    [
        ([], {}, "messages"),
        ([{"role": "tool", "content": "x"}], {}, "role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {}, "messages"),
        ([{"role": "developer", "content": "x"}], {}, "the chat template refuses the messages: no developers here"),
        (CONVERSATION, {"tools": []}, "tools: is no parameter"),
        (CONVERSATION, {"top_logprobs": 3, "logprobs": True}, "the chosen token alone"),
        (CONVERSATION, {"top_logprobs": 1}, "only with logprobs=true"),
    ],
)
def test_what_cannot_be_is_refused(gateway: Gateway, messages: Any, options: dict[str, Any], told: str) -> None:
    status, document = chat(gateway, messages, **options)
    assert status == 400 and told in document["error"]["message"]


def test_the_document_names_every_parameter_that_is_taken(gateway: Gateway) -> None:
    """The parameters are those that the README of the gateway's page promises (docs/openai.md)."""
    status, document = gateway.get("/openapi.json")
    assert status == 200
    text = (Path(__file__).parent.parent / "docs" / "openai.md").read_text(encoding="utf-8")
    for body in ("CompletionBody", "ChatBody"):
        for name in document["components"]["schemas"][body]["properties"]:
            assert f"`{name}`" in text, name


# Any JSON, and bodies that are nearly right: each parameter with a value of its kind, or with another's.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_IDS = st.lists(st.integers(-2, 1100), max_size=12)
_PROMPTS = st.text(max_size=40) | _IDS | st.lists(st.text(max_size=12), max_size=4) | st.lists(_IDS, max_size=3) | _ANY
_NUMBERS = st.floats(-3, 3) | st.integers(-3, 40) | _ANY
_SHARED = {
    "n": st.integers(0, 4) | _ANY, "stream": st.booleans() | _ANY, "stop": st.text(max_size=4) | _ANY,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | _ANY,
    "seed": st.integers(-(2**65), 2**65) | _ANY, "temperature": _NUMBERS, "top_p": _NUMBERS, "top_k": _NUMBERS,
    "min_p": _NUMBERS, "presence_penalty": _NUMBERS, "frequency_penalty": _NUMBERS, "repetition_penalty": _NUMBERS,
    "logit_bias": st.dictionaries(st.integers(-2, 1100).map(str), _NUMBERS, max_size=3) | _ANY,
    "min_tokens": _NUMBERS, "ignore_eos": st.booleans() | _ANY, "user": st.text() | _ANY, "max_tokens": _NUMBERS,
}  # fmt: skip
_COMPLETIONS = st.fixed_dictionaries(
    {"model": st.just("minitron"), "prompt": _PROMPTS},
    optional=_SHARED | {"best_of": _NUMBERS, "echo": st.booleans() | _ANY, "logprobs": _NUMBERS, "suffix": _ANY},
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]),
                           "content": st.text(max_size=20) | _ANY}), max_size=3) | _ANY  # fmt: skip
_CHATS = st.fixed_dictionaries(
    {"model": st.just("minitron"), "messages": _MESSAGES},
    optional=_SHARED | {"logprobs": st.booleans() | _ANY, "top_logprobs": _NUMBERS},
)
_BODIES = st.one_of(_COMPLETIONS.map(json.dumps), _CHATS.map(json.dumps), _ANY.map(json.dumps), st.binary(max_size=60))
_PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(st.tuples(_PATHS, _BODIES), min_size=20, max_size=20))
def test_ten_thousand_bodies_of_any_kind_are_answered_or_refused(gateway: Gateway, asked: list[Any]) -> None:
    """No status of the 5xx, no hang (the client waits two minutes), and what is answered is OpenAI's JSON or events."""
    connection = gateway.connect()
    for path, body in asked:
        connection.request("POST", path, body.encode() if isinstance(body, str) else body)
        answer = connection.getresponse()
        assert answer.status in (200, 400, 404, 413), (path, body, answer.read())
        _read(answer)
    connection.close()


def _read(answer: http.client.HTTPResponse) -> None:
    if answer.getheader("content-type") == "application/json":
        assert set(json.loads(answer.read())) & {"choices", "error"}
    else:
        list(events(answer))
        answer.read()
