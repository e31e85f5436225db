"""Cases about what an answer holds: tokens, text, counts, log probs, its end.

Expected is never a stored text: each case compares an answer with another one that must agree with it by the rule.
Rules: contract of the tensorrt_llm model (triton_backend/inflight_batcher_llm/src/utils.cc, model_instance_state.cc of
TensorRT-LLM 1.2.0rc8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minitron_client.conformance.subject import (
    ENGINE,
    TEXT_MODEL,
    Answer,
    Call,
    Disagreement,
    Message,
    NotApplicable,
    RefusedByServer,
    Subject,
)

_SAMPLING = {"runtime_top_k": 50, "temperature": 1.3}
_TEXT = "In the beginning God created the heaven and the earth. And the"
_LOG_PROB_TOLERANCE = 1e-3
_LONG, _LONG_PROMPT, _LONG_OUTPUT = 900, 1000, 8


def streaming(subject: Subject) -> str:
    """A stream never has the prompt, and each response only what is new."""
    for exclude in (True, False):
        answer = answered(
            subject, subject.request(len(subject.greedy), streaming=True, exclude_input_in_output=exclude)
        )
        agree("streamed tokens", answer.token_ids, subject.greedy)
    return f"{len(answer.responses)} responses, {len(subject.greedy)} tokens"


def whole_answer(subject: Subject) -> str:
    """The request's switch decides whether the prompt comes first."""
    wanted = subject.greedy[:8]
    agree("without the prompt", answered(subject, subject.request(8)).token_ids, wanted)
    with_prompt = answered(subject, subject.request(8, exclude_input_in_output=False))
    agree("with the prompt", with_prompt.token_ids, subject.prompt + wanted)
    return "8 tokens without and with the prompt"


def counts(subject: Subject) -> str:
    """``sequence_length`` and ``num_output_tokens`` of each response, ``num_input_tokens`` of the prompt."""
    asked = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    answer = answered(subject, subject.request(6, streaming=True, **asked))
    agree("tokens counted", sum(int(one["num_output_tokens"].sum()) for one in answer.responses), 6)
    agree("sequence_length", sum(int(one["sequence_length"].sum()) for one in answer.responses), 6)
    agree(
        "prompt tokens",
        {int(one["num_input_tokens"].reshape(-1)[0]) for one in answer.responses},
        {len(subject.prompt)},
    )
    return "6 tokens and the prompt's length counted by the server"


def log_probs(subject: Subject) -> str:
    """One per token, never above 0, their sum cumulated; absent unless asked for."""
    plain = answered(subject, subject.request(6))
    if any(name.endswith("log_probs") for name in plain.responses[0]):
        raise Disagreement("log probs came without being asked for")
    answer = answered(subject, subject.request(6, return_log_probs=True))
    agree("tokens", answer.token_ids, subject.greedy[:6])
    found = [float(value) for one in answer.responses for value in one["output_log_probs"].reshape(-1)]
    if len(found) != 6 or not all(math.isfinite(value) and value <= 0 for value in found):
        raise Disagreement(f"log probs of 6 tokens are {found}")
    if all(value == 0 for value in found):
        raise Disagreement("every log prob is 0: they are normalised over the one token that greedy search keeps")
    total = float(answer.responses[-1]["cum_log_probs"].reshape(-1)[0])
    if abs(total - sum(found)) > _LOG_PROB_TOLERANCE * max(1, abs(total)):
        raise Disagreement(f"cum_log_probs is {total}, and the tokens' add up to {sum(found)}")
    return f"6 values, {total:.3f} together"


def long_prompt(subject: Subject) -> str:
    """Past 900 tokens prompts were seen to end in NaN (TensorRT-LLM#2255); log probs show it, tokens need not."""
    length = min(_LONG_PROMPT, subject.longest_prompt, subject.limits.max_seq_len - _LONG_OUTPUT)
    if length <= _LONG:
        raise NotApplicable(f"the engine takes no prompt of more than {_LONG} tokens")
    answer = answered(subject, subject.request(_LONG_OUTPUT, subject.prompt_of(length), return_log_probs=True))
    found = [float(value) for one in answer.responses for value in one["output_log_probs"].reshape(-1)]
    if len(found) != _LONG_OUTPUT or not all(map(math.isfinite, found)):
        raise Disagreement(f"log probs after a prompt of {length} tokens are {found}")
    return f"{length} tokens, log probs {sum(found):.3f} together"


def logits(subject: Subject) -> str:
    """Where they are offered at all: one row a token, and a greedy token is its row's best."""
    if not subject.takes(ENGINE, "return_generation_logits"):
        raise NotApplicable("no logits are offered (serving.max_logits_bytes)")
    answer = answered(subject, subject.request(2, return_generation_logits=True))
    rows = np.concatenate([one["generation_logits"].reshape(-1, one["generation_logits"].shape[-1])
                           for one in answer.responses])  # fmt: skip
    agree("best of each row", rows[:, : subject.limits.vocab_size].argmax(axis=-1).tolist(), answer.token_ids)
    return f"{rows.shape[0]} rows of {rows.shape[1]}"


def batch(subject: Subject) -> str:
    """Rows of one request are answered one by one, each with its ``batch_index``."""
    if subject.limits.max_batch_size < 2:
        raise NotApplicable("the engine takes one sequence at a time")
    prompt = subject.prompt
    rows = [prompt, prompt[: len(prompt) // 2 + 1]]
    ids = np.zeros((2, len(prompt)), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    request = {"input_ids": ids, "input_lengths": np.array([[len(row)] for row in rows], np.int32),
               "request_output_len": np.array([[6], [4]], np.int32),
               "exclude_input_in_output": np.ones((2, 1), bool)}  # fmt: skip
    answer = answered(subject, request)
    found = {int(one["batch_index"].reshape(-1)[0]): one["output_ids"].reshape(-1).tolist() for one in answer.responses}
    alone = answered(subject, subject.request(4, rows[1])).token_ids
    agree("rows", found, {0: subject.greedy[:6], 1: alone})
    return "2 rows of different lengths, as if each were alone"


def several_sequences(subject: Subject) -> str:
    """Each sampled sequence has its ``sequence_index``."""
    count = min(3, subject.limits.max_batch_size)
    if count < 2:
        raise NotApplicable("the engine takes one sequence at a time")
    answer = answered(subject, subject.request(8, num_return_sequences=count, seed=40, **_SAMPLING))
    found: dict[int, int] = {}
    for one in answer.responses:
        index = int(one["sequence_index"].reshape(-1)[0])
        found[index] = found.get(index, 0) + one["output_ids"].size
    agree("tokens by sequence", found, dict.fromkeys(range(count), 8))
    return f"{count} sequences of 8 tokens"


def text(subject: Subject) -> str:
    """Chunks join to the whole text."""
    whole, streamed = _front(subject, 48), _front(subject, 48, stream=True)
    agree("streamed text", streamed.text, whole.text)
    if "\ufffd" in streamed.text:
        raise Disagreement(f"a character was cut: {streamed.text!r}")
    return f"{len(whole.text)} characters in {len(streamed.responses)} responses"


def seeds(subject: Subject) -> str:
    """Sampling follows the seed."""
    first, again, other = (
        answered(subject, subject.request(16, seed=seed, **_SAMPLING)).token_ids for seed in (11, 11, 12)
    )
    agree("tokens of the same seed", again, first)
    if other == first:
        raise Disagreement("16 tokens of another seed are the same")
    return "16 tokens, twice with one seed and once with another"


def min_tokens(subject: Subject) -> str:
    """The end id cannot come before."""
    place = first_new(subject.greedy)
    answer = answered(subject, subject.request(place + 6, end_id=subject.greedy[place], min_tokens=place + 4))
    if len(answer.token_ids) < place + 4:
        raise Disagreement(f"{len(answer.token_ids)} tokens came, and at least {place + 4} were asked for")
    return f"{len(answer.token_ids)} tokens where the end id would have come after {place}"


def answered(subject: Subject, request: Mapping[str, Any], **how: str) -> Answer:
    """The answer to a request that must be answered: its last response is marked final, and no other."""
    answer = subject.ask(request, **how)
    if answer.error is not None:
        raise Disagreement(f"a good request was answered with: {answer.error}")
    answer.check_whole()
    return answer


def first(call: Call) -> Message:
    """The next message of a request that must be answered; raises RefusedByServer."""
    message = next(call)
    if message.error is not None:
        raise RefusedByServer(message.error)
    return message


def check_next_request(subject: Subject) -> None:
    """A plain request is answered as ever."""
    agree("the next request", answered(subject, subject.request(4)).token_ids, subject.greedy[:4])


def agree(what: str, found: object, wanted: object) -> None:
    """Raise Disagreement where two things that must be equal are not."""
    if found != wanted:
        raise Disagreement(f"{what}: {found!r}, and {wanted!r} was expected")


def first_new(tokens: list[int], at_least: int = 4) -> int:
    """The first place from ``at_least`` on whose token did not come before: it can end an answer there."""
    for place in range(at_least, len(tokens)):
        if tokens[place] not in tokens[:place]:
            return place
    raise NotApplicable("the model repeats itself: no token can end its answer at a known place")


def _front(subject: Subject, max_tokens: int, **more: object) -> Answer:
    return answered(subject, {"text_input": _TEXT, "max_tokens": max_tokens, **more}, model=TEXT_MODEL)
