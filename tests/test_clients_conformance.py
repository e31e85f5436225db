"""The behaviour suite against the CPU engine, and against servers that misbehave in one way each.

``minitron accept`` runs the very same cases against either engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import minitron_here
from minitron.checks import FAIL, PASS, SKIPPED
from minitron_client.client.endpoint import Endpoint
from minitron_client.conformance import suite
from minitron_client.conformance.subject import TENSORRT, Answer, Call, Subject

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def subject(server: dict[str, Any], small_repository: Callable[[str], Path]) -> Iterator[Subject]:
    urls = server["urls"]
    repository = small_repository("bfloat16")
    with Subject.of_repository(Endpoint(urls["grpc"]), repository, urls["metrics"], urls["http"]) as opened:
        yield opened


@pytest.mark.parametrize("name", suite.CASES)
def test_the_cpu_engine_behaves_as_documented(subject: Subject, name: str) -> None:
    wanted = SKIPPED if name == "behaviour.logits" else PASS  # this engine gives none, and none are offered
    for _ in range(3):  # its longest answer takes half a second: on a busy machine it may be over before anybody leaves
        (line,) = suite.run(subject, [name])
        if line.verdict == wanted or name != "behaviour.cancel":
            break
    assert (line.verdict, line.name) == (wanted, name), line.evidence


class Misbehaving:
    """The same server, its answers changed on the way; ``greedy`` and what a case needs beforehand stay right."""

    def __init__(self, subject: Subject, change: Callable[[Mapping[str, Any], Answer], Answer]) -> None:
        self._subject, self._change = subject, change
        subject.greedy  # noqa: B018 - asked before anything is changed

    def ask(self, tensors: Mapping[str, Any], **how: Any) -> Answer:
        return self._change(tensors, self._subject.ask(tensors, **how))

    def generate(self, asked: Mapping[str, Any], *, model: str) -> Any:
        """Over HTTP the last event but one is lost: of one that is answered whole, all."""
        return (
            _Lossy(self._subject.generate(asked, model=model))
            if self._change is lost_event
            else (self._subject.generate(asked, model=model))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


class _Lossy:
    """Events without the first."""

    def __init__(self, events: Any) -> None:
        self.status, self._events = events.status, events

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._events)[1:])


def _replaced(answer: Answer, name: str, change: Callable[[Any], Any]) -> Answer:
    return Answer([{key: change(value) if key == name else value for key, value in one.items()}
                   for one in answer.responses], answer.error, answer.finals)  # fmt: skip


def another_token(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return _replaced(answer, "output_ids", lambda ids: (ids + 1) % 1024)


def other_text(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    how = "streamed" if tensors.get("stream") else "whole"
    return _replaced(answer, "text_output", lambda text: np.array([f"{text.reshape(-1)[0]} {how}"], object))


def no_error(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """Everything is answered."""
    return Answer(answer.responses, None, answer.finals)


def another_error(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return Answer(answer.responses, answer.error and "out of luck", answer.finals)


def never_final(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return Answer(answer.responses, answer.error, [False] * len(answer.finals))


def error_for_stop(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return Answer([], "no such request", [True]) if "stop" in tensors else answer


def without_counts(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return _replaced(answer, "num_output_tokens", np.zeros_like)


def lost_event(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """gRPC is as it should be."""
    return answer


def _more_tokens(answer: Answer, *tokens: int) -> Answer:
    more = {"output_ids": np.array([[tokens]], np.int32), "num_output_tokens": np.array([[len(tokens)]], np.int32)}
    return Answer([*answer.responses, more], answer.error, [False, *answer.finals])


def keeps_the_end(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """The end token is counted among the output, as the echo engine once did."""
    end = tensors.get("end_id", -1)
    return _more_tokens(answer, end) if end >= 0 and "input_ids" in tensors and answer.error is None else answer


def error_for_an_end(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """Every text that ends by itself is answered with an error, as the text model once did."""
    tokens = sum(int(one["num_output_tokens"].sum()) for one in answer.responses if "num_output_tokens" in one)
    if "text_input" not in tensors or tokens >= tensors["max_tokens"] or answer.error:
        return answer
    error = f"tensorrt_llm failed after {tokens} of up to {tensors['max_tokens']} tokens"
    return Answer(answer.responses, error, answer.finals)


def more_behind_an_error(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """The error in one message, the final flag in another."""
    return Answer(answer.responses, answer.error, [False, True, False]) if answer.error else answer


def zero_log_probs(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return _replaced(answer, "output_log_probs", np.zeros_like)


def nan_log_probs(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return _replaced(answer, "output_log_probs", lambda found: np.full_like(found, np.nan))


def no_index(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return _replaced(_replaced(answer, "batch_index", np.zeros_like), "sequence_index", np.zeros_like)


def no_seed(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    """Every sample is the same."""
    return _replaced(answer, "output_ids", np.zeros_like)


def ends_early(tensors: Mapping[str, Any], answer: Answer) -> Answer:
    return (
        Answer(answer.responses[:1], answer.error, answer.finals) if "min_tokens" not in tensors else _shorter(answer)
    )


def _shorter(answer: Answer) -> Answer:
    return _replaced(answer, "output_ids", lambda ids: ids[..., :4])


MISBEHAVIOUR: dict[str, tuple[Callable[[Mapping[str, Any], Answer], Answer], str]] = {
    "streaming": (another_token, "streamed tokens"),
    "whole_answer": (another_token, "without the prompt"),
    "counts": (without_counts, "tokens counted: 0, and 6"),
    "log_probs": (zero_log_probs, "every log prob is 0"),
    "long_prompt": (nan_log_probs, "log probs after a prompt of 1000 tokens are [nan"),
    "batch": (no_index, "rows"),
    "several_sequences": (no_index, "tokens by sequence"),
    "length": (lost_event, "tensorrt_llm, HTTP, streamed: tokens counted: 23, and 24"),
    "end_id": (keeps_the_end, "tensorrt_llm, gRPC, streamed: tokens counted: 5, and 4"),
    "end_first": (error_for_an_end, "failed after 0 of up to 24 tokens"),
    "end_own": (error_for_an_end, "of up to 256 tokens"),
    "refusal": (more_behind_an_error, "of 3 messages, 1 are marked as the last one; the error was"),
    "stop_ids": (another_token, "tokens with a stop list"),
    "stop_words": (other_text, "text before"),
    "text": (other_text, "streamed text"),
    "seeds": (no_seed, "16 tokens of another seed are the same"),
    "min_tokens": (ends_early, "4 tokens came"),
    "stop": (error_for_stop, "the answer to stop of an unknown id"),
    "stop_without_id": (no_error, "should be refused"),
    "prompt_limit": (another_error, "'exceed' was expected"),
    "sequence_limit": (no_error, "should be refused"),
    "output_length_zero": (no_error, "should be refused"),
    "empty_prompt": (no_error, "should be refused"),
    "top_p_range": (no_error, "should be refused"),
    "malformed_words": (no_error, "should be refused"),
    "foreign_token": (no_error, "should be refused"),
    "beam_width": (no_error, "should be refused"),
    "bad_words": (no_error, "should be refused"),
    "embedding_bias": (another_error, "'not supported by the CPU engine' was expected"),
}


def test_an_answer_without_an_end_fails_the_case(subject: Subject) -> None:
    (line,) = suite.run(Misbehaving(subject, never_final), ["behaviour.batch"])  # type: ignore[arg-type]
    assert line.verdict == FAIL and "0 are marked as the last one" in line.evidence


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_a_server_that_does_otherwise_fails_the_case(subject: Subject, case: str) -> None:
    change, said = MISBEHAVIOUR[case]
    (line,) = suite.run(Misbehaving(subject, change), [f"behaviour.{case}"])  # type: ignore[arg-type]
    assert line.verdict == FAIL
    assert said in line.evidence


def test_a_client_that_leaves_and_keeps_the_server_generating_is_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel that does nothing: the whole answer is generated."""
    kept: list[Call] = []

    def keep(call: Call) -> None:
        kept.append(call)  # gRPC cancels a call that nobody has any more

    monkeypatch.setattr(Call, "cancel", keep)
    short_answers(subject, monkeypatch)
    (line,) = suite.run(subject, ["behaviour.cancel"])
    for call in kept:
        call.rest()
    assert line.verdict == FAIL and "steps were made for a client that had left" in line.evidence


def short_answers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest answer that is asked for has 64 tokens."""
    for name in ("room", "text_room"):
        monkeypatch.setitem(subject.__dict__, name, 64)


def test_a_deadline_that_the_server_does_not_hear_of_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client says that it gave up, and its stream goes on."""
    kept = []

    def stream(deadline_s: float = 300) -> Call:
        call = Subject.stream(subject)
        if deadline_s < 300:
            kept.append(call)
            monkeypatch.setattr(call, "rest", lambda: Answer([], "Deadline Exceeded", []))
        return call

    monkeypatch.setattr(subject, "stream", stream)
    short_answers(subject, monkeypatch)
    (line,) = suite.run(subject, ["behaviour.deadline"])
    for call in kept:
        Call.rest(call)
    assert line.verdict == FAIL and "deadline: " in line.evidence and "for a client that had left" in line.evidence


def renamed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with the input ``wanted`` arrive under an id of their own."""
    send = Call.send

    def other(call: Call, tensors: Mapping[str, Any], **how: Any) -> str:
        return send(call, tensors, **(how | {"request_id": None} if wanted in tensors else how))

    monkeypatch.setattr(Call, "send", other)


def test_a_stop_that_stops_nothing_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed("stop", monkeypatch)
    for name in ("room", "text_room"):
        monkeypatch.setitem(subject.__dict__, name, 400)
    (line,) = suite.run(subject, ["behaviour.stop"])
    assert line.verdict == FAIL and "the request ran to its end all the same" in line.evidence


def test_an_id_that_two_requests_may_have_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed("return_num_input_tokens", monkeypatch)
    (line,) = suite.run(subject, ["behaviour.duplicate_id"])
    assert line.verdict == FAIL and "it was answered, and should be refused" in line.evidence


def test_a_queue_that_takes_everything_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that at most two may wait, it sends less than what the server's own limit is."""
    monkeypatch.setitem(subject.__dict__, "queue_limit", 2)
    (line,) = suite.run(subject, ["behaviour.queue_full"])
    assert line.verdict == FAIL and "requests were taken with a queue of 2" in line.evidence
    monkeypatch.setitem(subject.__dict__, "queue_limit", 0)
    (line,) = suite.run(subject, ["behaviour.queue_full"])
    assert line.verdict == SKIPPED


@pytest.mark.parametrize("case", ["duplicate_id", "bad_words", "embedding_bias", "sequence_limit"])
def test_what_the_cpp_backend_is_expected_to_do_the_cpu_engine_does_not(
    subject: Subject, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other expectation is really another one: taken for TensorRT-LLM, the CPU engine fails it."""
    monkeypatch.setattr(subject, "engine", TENSORRT)
    (line,) = suite.run(subject, [f"behaviour.{case}"])
    assert line.verdict == FAIL and "it was refused with" in line.evidence


def test_the_command_judges_what_it_is_told_to(
    server: dict[str, Any], small_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    def accept(*words: str | Path, url: str = server["urls"]["grpc"]) -> tuple[int, str, str]:
        whole = ("accept", small_repository("bfloat16"), "--output", tmp_path, "--url", url, *words)
        return minitron_here(*whole)

    code, said, _ = accept("--only", "behaviour.streaming", "behaviour.cancel")
    assert code == 0 and "PASS     behaviour.streaming" in said
    assert "SKIPPED  behaviour.cancel" in said  # without --metrics-url nobody can tell
    end_first = ("--only", "behaviour.end_first")
    assert "no token, 6 ways, gRPC alone (--http-url gives HTTP)" in accept(*end_first)[1]
    assert "no token, 12 ways" in accept(*end_first, "--http-url", server["urls"]["http"])[1]
    code, said, _ = accept(*end_first, "--http-url", "127.0.0.1:1")
    assert code == 8 and "HTTP: " in said and "Connection refused" in said
    code, _, error = accept("--only", "behaviour.sleeping")
    assert code == 2 and "there is no check behaviour.sleeping" in error
    code, _, error = accept("--only", "behaviour.streaming", url="127.0.0.1:1")
    assert code == 10 and "127.0.0.1:1" in error
    code, _, error = accept("--only", "server")
    assert code == 10 and "ask there, without --url" in error  # the runtime's log is where the server is
