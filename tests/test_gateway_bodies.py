"""What the gateway takes and what it says of the rest, and that its OpenAPI document says the same.

The judges are jsonschema (2020-12, which OpenAPI 3.1 is written in), the example bodies of the documentation, the
application's own routes, and the names of tensors in tests/data/triton_tensors.json. Limits are counted by hand.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from starlette.routing import Route

from conftest import ROOT, SMALL_MODEL
from minitron.errors import UsageError
from minitron.text.completion import Sampling
from minitron.text.engine import EngineCallError
from minitron.text.prompts import PromptMaker
from minitron.text.tokenizer import TextTokenizer
from minitron_gateway import openapi, problems
from minitron_gateway.app import Gateway, application
from minitron_gateway.bodies import ChatBody, CompletionBody
from minitron_gateway.problems import Problem
from minitron_gateway.settings import Limits, Settings

LIMITS = {"max_input_len": "100", "max_seq_len": "1000", "vocab_size": "1024"}
CONTRACT = json.loads((Path(__file__).parent / "data" / "triton_tensors.json").read_text())["models"]


def conforms(kind: type[CompletionBody] | type[ChatBody], body: dict[str, Any]) -> bool:
    document = openapi.document("minitron", keyed=False)
    return bool(Draft202012Validator({**document, "$ref": f"#/components/schemas/{kind.__name__}"}).is_valid(body))


def refusal(body: dict[str, Any], kind: type[CompletionBody] | type[ChatBody] = CompletionBody) -> Problem:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate_json(json.dumps(body))
    return problems.of_validation(refused.value)


def documented() -> Iterator[dict[str, Any]]:
    """The bodies in the documentation: of curl, and of OpenAI's client, whose ``extra_body`` goes beside the others."""
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        yield from (json.loads(found) for found in re.findall(r"-d '(\{[^']+\})'", text))
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
                if ast.unparse(call.func).endswith("completions.create"):
                    body = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                    yield {**body.pop("extra_body", {}), **body}


def test_the_document_takes_every_documented_body() -> None:
    Draft202012Validator.check_schema(openapi.document("minitron", keyed=False)["components"]["schemas"])
    bodies = list(documented())
    assert len(bodies) >= 6
    for body in bodies:
        assert CompletionBody.model_validate_json(json.dumps(body))
        assert conforms(CompletionBody, body), body


@pytest.mark.parametrize(
    "more",
    [
        {"stop": "\n"}, {"stop": ["a"] * 16}, {"stop": []}, {"stop": None}, {"prompt": "x"}, {"prompt": ["x", "y"]},
        {"prompt": [5, 6]}, {"prompt": [[5], [6, 7]]}, {"logit_bias": {"5": -100}}, {"min_p": 0}, {"min_p": None},
        {"suffix": None}, {"repetition_penalty": 0.01},
    ],
)  # fmt: skip
def test_what_is_taken_the_document_allows(more: dict[str, Any]) -> None:
    body = {"model": "minitron", "prompt": "x", **more}
    assert CompletionBody.model_validate_json(json.dumps(body))
    assert conforms(CompletionBody, body)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"prompt": []}, "prompt: must be a text, a list of token ids, or a list of either"),
        ({"prompt": [[]]}, "prompt: must be a text"),
        ({"prompt": [[5], []]}, "prompt: must be a text"),
        ({"prompt": ["x", [5]]}, "prompt: must be a text"),
        ({"prompt": [True]}, "prompt: must be a text"),
        ({"stop": 3}, "stop: must be a text, or a list of up to 16 texts"),
        ({"stop": ["a"] * 17}, "stop: must be a text, or a list of up to 16 texts"),
        ({"stop": ["a", 5]}, "stop: must be a text, or a list of up to 16 texts"),
        ({"stop": ""}, "stop: a stop text is empty"),
        ({"stop": ["a", ""]}, "stop: a stop text is empty"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: 101 was sent; it must be at most 100"),
        ({"min_p": 0.1}, "min_p: tensorrt_llm has no such input"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty: 5e-324 was sent; it must be at least 1.2e-38"),
        ({"temperature": -1}, "temperature: -1 was sent; it must be at least 0"),
        ({"max_tokens": 2**40}, "max_tokens: 1099511627776 was sent; it must be at most 2147483647"),
        ({"seed": 2**64}, "seed: 18446744073709551616 was sent; it must be below 18446744073709551616"),
        ({"max_token": 5}, "max_token: is no parameter of this endpoint"),
    ],
)
def test_what_is_refused_the_document_forbids(more: dict[str, Any], told: str) -> None:
    body = {"model": "minitron", "prompt": "x", **more}
    problem = refusal(body)
    assert problem.message.startswith(told) and problem.param == next(iter(more))
    assert not conforms(CompletionBody, body)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: 9 is more than the 8 tokens"),
        ({"min_tokens": 17}, "min_tokens: 17 is more than the 16 tokens"),  # OpenAI's default
        ({"min_tokens": 2**31 - 1, "max_tokens": 0}, "min_tokens: 2147483647 is more than the 0 tokens"),
        ({"best_of": 2, "n": 3}, "best_of: 2 is less than n (3)"),
        ({"best_of": 3, "stream": True}, "best_of: the best are known at the end"),
        ({"stream_options": {}}, "stream_options: only with stream=true"),
    ],
)
def test_what_does_not_go_together_names_the_parameter(more: dict[str, Any], told: str) -> None:
    problem = refusal({"model": "minitron", "prompt": "x", **more})
    assert problem.message.startswith(told) and problem.param == next(iter(more))


def test_a_conversation_s_min_tokens_are_judged_by_the_limit_that_it_gives() -> None:
    chat = {"model": "minitron", "messages": [{"role": "user", "content": "x"}], "min_tokens": 9}
    for name in ("max_tokens", "max_completion_tokens"):
        assert refusal({**chat, name: 8}, ChatBody).param == "min_tokens"
        assert ChatBody.model_validate_json(json.dumps({**chat, name: 9}))
    assert ChatBody.model_validate_json(json.dumps(chat))  # what is left of the model's length is not in the body


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"temperature": 0, "min_tokens": 2}, "min_tokens"),
        ({"temperature": 0, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 0, "presence_penalty": 1}, "presence_penalty"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"min_tokens": 2, "frequency_penalty": 1}, "a temperature above 0 and min_tokens and frequency_penalty"),
        ({}, "a temperature above 0"),
    ],
)
def test_log_probs_of_the_likeliest_are_refused_with_the_reason(more: dict[str, Any], reason: str) -> None:
    problem = refusal({"model": "minitron", "prompt": "x", "logprobs": 1, **more})
    assert problem.param == "logprobs"
    assert f"which need not be the likeliest with {reason}; ask for 0, or for 1 with" in problem.message


@pytest.mark.parametrize("more", [{"temperature": 0}, {"top_p": 0}, {"top_p": 5e-324, "top_k": 40}])
def test_what_takes_the_likeliest_has_its_log_probs(more: dict[str, Any]) -> None:
    """A ``top_p`` that is 0 in float32 is one that was not given, to TensorRT-LLM and the CPU engine."""
    body = CompletionBody.model_validate_json(json.dumps({"model": "minitron", "prompt": "x", "logprobs": 1, **more}))
    assert body.sampling(5, log_probs=True).is_greedy


def test_a_refusal_of_any_tensor_that_is_sent_has_openai_s_name_for_it() -> None:
    """Whatever of the engine's inputs a refusal names: the client hears of a parameter that it has."""
    sampled = Sampling(
        5, temperature=0.5, top_k=3, top_p=0.5, seed=1, min_tokens=2, repetition_penalty=2, presence_penalty=1,
        frequency_penalty=1, stop_words=("x",), bias={5: 1.0}, log_probs=True, prompt_log_probs=1,
    )  # fmt: skip
    maker = PromptMaker(TextTokenizer(str(SMALL_MODEL)), LIMITS | {"context_logits": "FP32"})
    sent = set(sampled.request().engine_inputs(sampled.prompt(maker, [300])))
    assert sent <= {tensor["name"] for tensor in CONTRACT["tensorrt_llm"]["inputs"]}
    ours = {"streaming", "exclude_input_in_output", "pad_id", "end_id"}  # no parameter makes them what they are
    names = {}
    for tensor in sent - ours:
        problem = problems.of_engine(
            EngineCallError(f"Executor: due to the following error: {tensor} is 7: it must be 5")
        )
        assert problem.status == 400 and problem.message == f"{problem.param} is 7: it must be 5"
        names[tensor] = problem.param
    assert set(names.values()) <= set(CompletionBody.model_fields)
    assert (names["embedding_bias"], names["request_output_len"]) == ("logit_bias", "max_tokens")
    assert (names["runtime_top_k"], names["stop_words_list"], names["input_ids"]) == ("top_k", "stop", "prompt")
    about_two = problems.of_engine(EngineCallError("min_tokens is 9: it must be from 0 to request_output_len (8)"))
    assert (about_two.message, about_two.param) == (
        "min_tokens is 9: it must be from 0 to max_tokens (8)",
        "min_tokens",
    )


@pytest.mark.parametrize("keys", [frozenset(), frozenset({b"digest"})])
def test_every_route_is_in_the_document_and_needs_what_it_says(keys: frozenset[bytes]) -> None:
    settings = Settings("127.0.0.1", 0, (), str(SMALL_MODEL), LIMITS, "minitron", keys=keys)
    routes = [one for one in application(Gateway(settings)).routes if isinstance(one, Route)]
    document = openapi.document("minitron", keyed=bool(keys))
    assert {one.path.replace(":path", "") for one in routes} == set(document["paths"])
    for route in routes:
        operations = document["paths"][route.path.replace(":path", "")]
        assert {name.upper() for name in operations} == (route.methods or {"POST"}) - {"HEAD"}
        for operation in operations.values():
            demands = bool(keys) and route.path.startswith("/v1/")
            assert operation.get("security", []) == ([{"key": []}] if demands else [])
            assert ("401" in operation["responses"]) is demands
            named = [one["name"] for one in operation.get("parameters", [])]
            assert named == re.findall(r"\{(\w+)", route.path)
    assert ("securitySchemes" in document["components"]) is bool(keys)


@pytest.mark.parametrize(
    ("asked", "each"),  # --max-prompts, --max-streams, --workers: sequences of a request, and in flight in a worker
    [
        ((None, 1024, 1), (128, 1024)),
        ((None, 1024, 8), (128, 128)),
        ((None, 1024, 9), (113, 113)),
        ((None, 4, 1), (4, 4)),
        ((None, 4, 2), (2, 2)),
        ((3, 8, 2), (3, 4)),
    ],
)
def test_what_one_request_may_ask_for_fits_into_one_worker(
    asked: tuple[int | None, int, int], each: tuple[int, int]
) -> None:
    limits = Limits.shared(1, *asked)
    assert (limits.sequences, limits.streams) == each


@pytest.mark.parametrize(
    ("asked", "least"), [((128, 1024, 9), 1152), ((5, 4, 1), 5), ((3, 4, 2), 6), ((None, 4, 8), 8)]
)
def test_limits_that_contradict_each_other_are_refused(asked: tuple[int | None, int, int], least: int) -> None:
    with pytest.raises(UsageError, match=f"raise --max-streams to {least}, or lower --max-prompts"):
        Limits.shared(1, *asked)
    assert Limits.shared(1, asked[0], least, asked[2]).sequences <= least // asked[2]


def test_its_url_can_be_pasted() -> None:
    """RFC 3986, 3.2.2: an IPv6 address in a URL stands in brackets."""
    there = [Settings(host, 80, (), "", {}, "m", cert=cert).url for host, cert in (("::1", ""), ("10.0.0.1", "x.pem"))]
    assert there == ["http://[::1]:80/v1", "https://10.0.0.1:80/v1"]
