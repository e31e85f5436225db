"""Log probs of the prompt over ``/v1/completions`` (echo with logprobs), as lm-eval and others score with them.

The expected figures are transformers' own logits in float32 (``answers``, of the small Minitron in bfloat16, which is
what the server serves), the texts of tokens the tokenizers library's decode, and the shape is that of OpenAI's API
reference: a prompt's first token has no log prob, and its own stands among the likeliest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from answers import Answers
from conftest import SMALL_MODEL
from gateway_process import Gateway
from minitron.model.precision import Precision

pytestmark = pytest.mark.server

ANSWERS = Answers.load("small")
#: The prompt that transformers' logits are there of at every place, with its rows.
NUMBER = max({prompt for prompt, _ in ANSWERS.places}, key=[prompt for prompt, _ in ANSWERS.places].count)
IDS = ANSWERS.prompts[NUMBER]
ROWS = np.stack([
    row for (prompt, _), row in zip(ANSWERS.places, ANSWERS.variants[Precision.BFLOAT16].logits, strict=True)
    if prompt == NUMBER
]).astype(np.float64)  # fmt: skip
LOG_PROBS = (
    ROWS - np.log(np.exp(ROWS - ROWS.max(-1, keepdims=True)).sum(-1, keepdims=True)) - ROWS.max(-1, keepdims=True)
)
OWN = [float(LOG_PROBS[place, token]) for place, token in enumerate(IDS[1:])]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))


def scored(gateway: Gateway, prompt: Any = IDS, **options: Any) -> list[Any]:
    return list(
        gateway.complete(prompt, **{"echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0, **options})[
            "choices"
        ]
    )


def test_log_probs_are_transformers_own(gateway: Gateway, tokenizer: Tokenizer) -> None:
    (choice,) = scored(gateway)
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(OWN, abs=1e-3)
    assert found["top_logprobs"] is None  # of none was asked
    whole = tokenizer.decode(IDS)
    assert choice["text"] == "".join(found["tokens"]) == whole
    assert found["text_offset"] == [len("".join(found["tokens"][:place])) for place in range(len(IDS))]
    assert choice["finish_reason"] == "length"


def test_the_likeliest_are_the_best_of_transformers_logits_and_the_prompt_s_own(
    gateway: Gateway, tokenizer: Tokenizer
) -> None:
    (choice,) = scored(gateway, logprobs=5)
    top = choice["logprobs"]["top_logprobs"]
    assert top[0] is None
    for place, found in enumerate(top[1:]):
        row, lead = LOG_PROBS[place], tokenizer.decode([IDS[place]])
        best = row.argsort()[::-1][:5].tolist()
        expected = {
            tokenizer.decode([IDS[place], token])[len(lead) :]: row[token]
            for token in reversed([*best, IDS[place + 1]])
        }
        assert found == pytest.approx(expected, abs=1e-3)
        assert list(found.values())[:5] == sorted(found.values(), reverse=True)[:5]


def test_one_token_more_is_the_model_s_next_with_its_own_log_prob(gateway: Gateway, tokenizer: Tokenizer) -> None:
    (choice,) = scored(gateway, logprobs=1, max_tokens=1)
    found, best = choice["logprobs"], int(LOG_PROBS[-1].argmax())
    assert found["token_logprobs"][1:] == pytest.approx([*OWN, LOG_PROBS[-1][best]], abs=1e-3)
    assert choice["text"] == "".join(found["tokens"]) == tokenizer.decode([*IDS, best])
    assert found["text_offset"][-1] == len(tokenizer.decode(IDS))
    assert max(found["top_logprobs"][-1].values()) == found["token_logprobs"][-1]
    # What lm-eval asks of each place: whether the prompt's token is the likeliest there.
    greedy = [
        max(top.values()) == own
        for top, own in zip(found["top_logprobs"][1:-1], found["token_logprobs"][1:-1], strict=True)
    ]
    assert greedy == [int(LOG_PROBS[place].argmax()) == token for place, token in enumerate(IDS[1:])]


def test_a_text_several_prompts_and_ids_are_scored_alike(gateway: Gateway, tokenizer: Tokenizer) -> None:
    """Several at once are each what it is by itself, and none is shortened by what the others left in the cache."""
    texts = [
        "In the beginning God created the heaven and the earth.",
        "In the beginning God created the great whales.",
        "x",
    ]
    ids = [tokenizer.encode(text).ids for text in texts]
    alone = [scored(gateway, text, logprobs=2)[0]["logprobs"] for text in texts]
    assert [len(one["tokens"]) for one in alone] == list(map(len, ids))
    for prompts in (texts, ids):
        together = scored(gateway, prompts, logprobs=2)
        for choice, expected in zip(together, alone, strict=True):
            assert choice["logprobs"]["tokens"] == expected["tokens"]
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected["token_logprobs"][1:], abs=1e-4)
    assert "".join(alone[0]["tokens"]) == texts[0]


def test_the_prompt_again_is_as_long(gateway: Gateway) -> None:
    """OpenVINO GenAI's prefix cache would shorten the list of a prompt that it has seen."""
    prompt = list(range(300, 400))
    first, second = (scored(gateway, prompt)[0]["logprobs"]["token_logprobs"] for _ in range(2))
    gateway.complete(prompt, max_tokens=4)
    third = scored(gateway, prompt, max_tokens=3, temperature=1, seed=1)[0]["logprobs"]["token_logprobs"]
    assert len(first) == len(second) == 100 and len(third) == 103
    assert first[1:] == pytest.approx(second[1:]) and first[1:] == pytest.approx(third[1:100])


def test_several_choices_and_streams_carry_them_too(gateway: Gateway) -> None:
    choices = scored(gateway, max_tokens=2, n=2, temperature=1, seed=3)
    assert [one["logprobs"]["token_logprobs"][1 : len(IDS)] == pytest.approx(OWN, abs=1e-3) for one in choices] == [
        True
    ] * 2
    best = gateway.complete(IDS, echo=True, max_tokens=2, n=1, best_of=3, temperature=1, seed=3)["choices"]
    assert best[0]["logprobs"] is None and best[0]["text"].startswith(choices[0]["text"][:5])
    asked: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 4, "temperature": 0}
    (whole,) = scored(gateway, **asked)
    with gateway.stream(IDS, **asked) as stream:
        first, last = (event["choices"][0] for _, event in stream)  # as docs/openai.md says
    assert (first["text"], first["logprobs"]) == (whole["text"], whole["logprobs"]) and first["finish_reason"] is None
    assert (last["text"], last["logprobs"], last["finish_reason"]) == ("", None, "length")
    stop = whole["text"][-3:]
    (stopped,) = scored(gateway, **{**asked, "stop": stop})
    assert stopped["finish_reason"] == "stop" and whole["text"].startswith(stopped["text"])
