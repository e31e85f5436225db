"""Two hundred answers that end by themselves: whole, with finish reason ``stop``, and exactly the tokenizer's text.

The judge is the token model without an end token: what it says until then, decoded by the package ``tokenizers``.
Through the text model and the ensemble, over gRPC and HTTP, streamed and whole, with an end token that the request
names and with the model's own.
"""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from minitron_client.client import Client, Request

pytestmark = pytest.mark.server

PROMPTS = (
    "In the beginning", "And the king said unto", "The grace of our Lord", "Blessed are the", "And it came to pass",
)  # fmt: skip
LONGEST = 24
#: One seed in four of this one says the model's own end token.
AMEN, SEEDS, OWN_END = "The grace of our Lord Jesus Christ be with you all. Amen.\n", range(32), 3


@dataclass(frozen=True)
class Case:
    """A request and what must come of it: ``text`` after ``tokens`` tokens."""

    prompt: str
    options: dict[str, Any]
    text: str
    tokens: int


@pytest.fixture(scope="module")
def client(server: dict[str, Any]) -> Iterator[Client]:
    with Client(server["urls"]["grpc"]) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(small_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def says(client: Client, tokenizer: Tokenizer) -> Callable[..., list[int]]:
    """What the token model says behind a text, when nothing ends it."""

    def ids(prompt: str, count: int, **options: Any) -> list[int]:
        asked = Request(input_ids=tokenizer.encode(prompt).ids, max_tokens=count, **options)
        return list(client.generate(asked, model="tensorrt_llm").token_ids)

    return ids


def until(tokenizer: Tokenizer, prompt: str, ids: list[int], end: int, **options: Any) -> Case:
    """The answer that the first ``end`` in ``ids`` ends."""
    kept = ids[: ids.index(end)]
    before = tokenizer.encode(prompt).ids
    text = tokenizer.decode([*before, *kept]).removeprefix(tokenizer.decode(before))
    return Case(prompt, options, text, len(kept))


@pytest.fixture(scope="module")
def cases(tokenizer: Tokenizer, says: Callable[..., list[int]]) -> list[Case]:
    found = []
    for prompt in PROMPTS:
        ids = says(prompt, LONGEST)
        for end in list(dict.fromkeys(ids))[:9]:
            found.append(until(tokenizer, prompt, ids, end, max_tokens=LONGEST, end_id=end))
    for seed in SEEDS:
        options = {"temperature": 1.0, "top_p": 1.0, "seed": seed}
        ids = says(AMEN, 300, **options)
        if OWN_END in ids:
            found.append(until(tokenizer, AMEN, ids, OWN_END, max_tokens=300, **options))
    assert sum("end_id" not in case.options for case in found) >= 3  # the model's own end is among them
    return found


def over_http(server: dict[str, Any], model: str, case: Case, *, streamed: bool) -> str:
    words = {"text_input": case.prompt, "stream": streamed, **case.options}
    request = urllib.request.Request(
        f"http://{server['urls']['http']}/v2/models/{model}/generate{'_stream' if streamed else ''}",
        json.dumps(words).encode(),
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        body = answer.read().decode()
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")] or [body]
    texts = [json.loads(event) for event in events]
    assert not any("error" in one for one in texts), body
    return "".join(one.get("text_output", "") for one in texts)


# A stream of the ensemble loses spaces and split characters (docs/model-repository.md): it is not compared.
WAYS = [
    (model, transport, streamed)
    for model, transport, streamed in itertools.product(
        ("tensorrt_llm_bls", "ensemble"), ("grpc", "http"), (False, True)
    )
    if not (model == "ensemble" and streamed)
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_answer_that_ends_by_itself_is_whole(
    server: dict[str, Any], client: Client, cases: list[Case], way: tuple[str, str, bool]
) -> None:
    assert len(cases) * len(WAYS) >= 200
    model, transport, streamed = way
    for case in cases:
        # The ensemble decodes an answer by itself: without the space before its first word.
        wanted = case.text.lstrip(" ") if model == "ensemble" else case.text
        if transport == "http":
            found = over_http(server, model, case, streamed=streamed)
        else:
            if streamed:
                stream = client.stream(case.prompt, model=model, **case.options)
                found = "".join(chunk.text for chunk in stream)
                response = stream.response
            else:
                response = client.generate(case.prompt, model=model, **case.options)
                found = response.text
            assert (response.finish_reason, response.token_count) == ("stop", case.tokens), case
        assert (found.lstrip(" ") if model == "ensemble" else found) == wanted, case
