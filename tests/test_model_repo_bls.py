"""The front in the real server, over an engine that says its prompt again: so every expected text is known beforehand.

Rules are those of the contract for a BLS (one line per error, cancel, drain, counts of this response, ``stop``).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hand_made
from serving import Stream, server, text_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

BLS = "tensorrt_llm_bls"
PROMPT = "the quick brown fox é 日 ☃ jumps"


@pytest.fixture
def stream(echo_server: dict[str, Any]) -> Any:
    one = Stream(echo_server["urls"]["grpc"])
    yield one
    one.close()


def steps_of_last(echo_server: dict[str, Any], after: int) -> dict[str, Any]:
    """The engine's note about the request that ended after ``after`` others."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = echo_server["steps"].read_text().splitlines() if echo_server["steps"].exists() else []
        if len(lines) > after:
            return dict(json.loads(lines[after]))
        time.sleep(0.02)
    raise AssertionError("the engine still works")


def ended(echo_server: dict[str, Any]) -> int:
    return len(echo_server["steps"].read_text().splitlines()) if echo_server["steps"].exists() else 0


def test_streamed_and_whole_text_are_the_same_and_no_space_or_character_is_lost(stream: Stream) -> None:
    pieces = stream.responses(BLS, text_input=PROMPT, max_tokens=60, stream=True)
    whole = stream.responses(BLS, text_input=PROMPT, max_tokens=60)
    assert len(whole) == 1 and len(pieces) > 1  # how many is the pace's to say: a late process gathers tokens
    assert text_of(pieces) == text_of(whole)
    assert (" " + PROMPT) * 3 in text_of(whole) + " " + PROMPT * 2  # says the prompt, each time with its space
    assert "\ufffd" not in text_of(whole)


def test_the_prompt_comes_before_a_whole_answer_when_asked(stream: Stream) -> None:
    told = stream.responses(BLS, text_input="the quick", max_tokens=4, exclude_input_in_output=False)
    assert text_of(told) == "the quick the quick the quick"
    streamed = stream.responses(BLS, text_input="the quick", max_tokens=4, exclude_input_in_output=False, stream=True)
    assert text_of(streamed) == " the quick the quick"


@pytest.mark.parametrize("streams", [True, False])
def test_a_stop_string_across_tokens_ends_text_and_engine(
    echo_server: dict[str, Any], stream: Stream, streams: bool
) -> None:
    before = ended(echo_server)
    # The tokens are " stop" "ped" " here": no token list can name "pped h".
    found = stream.responses(
        BLS, text_input="the stopped here now", max_tokens=900, stream=streams, stop_words=["pped h"], temperature=5.0
    )
    assert text_of(found) == " the sto"
    note = steps_of_last(echo_server, before)
    assert note["stopped"] and note["steps"] < 100


def test_text_that_only_begins_like_a_stop_string_is_given_out(stream: Stream) -> None:
    found = stream.responses(BLS, text_input="the stop", max_tokens=2, stream=True, stop_words=["stopped", "fox"])
    assert text_of(found) == " the stop"


def test_sequences_counts_and_log_probs_belong_to_each_response(stream: Stream) -> None:
    asked: dict[str, Any] = {
        "return_num_output_tokens": True,
        "return_num_input_tokens": True,
        "return_log_probs": True,
    }
    found = stream.responses(BLS, text_input="the quick brown", max_tokens=6, num_return_sequences=2, **asked)
    assert [r["sequence_index"].tolist() for r in found] == [[[0]], [[1]]]
    assert [r["text_output"].tolist() for r in found] == [[b" the quick brown the quick brown"]] * 2
    assert [r["num_output_tokens"].tolist() for r in found] == [[[6]]] * 2
    assert [r["num_input_tokens"].tolist() for r in found] == [[[3]]] * 2
    assert [r["output_log_probs"].shape for r in found] == [(1, 1, 6)] * 2
    streamed = stream.responses(BLS, text_input="the quick brown", max_tokens=6, stream=True, **asked)
    assert [int(r["num_output_tokens"].item()) for r in streamed if "num_output_tokens" in r] == [1] * 6
    # With stop strings the engine streams behind a whole answer: its parts are put together.
    parts = stream.responses(BLS, text_input="the quick brown", max_tokens=6, stop_words=["zz"], **asked)
    assert [int(r["num_output_tokens"].item()) for r in parts] == [6]
    assert parts[0]["output_log_probs"].tolist() == found[0]["output_log_probs"].tolist()
    plain = stream.responses(BLS, text_input="the", max_tokens=2)[0]
    assert set(plain) == {"text_output"}


def test_a_batch_is_answered_row_by_row(stream: Stream) -> None:
    rows = np.array([[b"the quick"], [b"brown fox jumps"]], dtype=object)
    found = stream.responses(BLS, text_input=rows, max_tokens=np.array([[2], [3]], np.int32))
    texts = {int(r["batch_index"].item()): r["text_output"][0].decode() for r in found}
    assert texts == {0: " the quick", 1: " brown fox jumps"}


def test_sixty_four_streams_at_once_are_each_in_order(echo_server: dict[str, Any]) -> None:
    words = ("quick", "brown", "fox", "jumps", "stopped", "here", "and", "now")

    def one(number: int) -> None:
        own = Stream(echo_server["urls"]["grpc"])
        prompt = f"the {words[number % 8]} {words[number // 8]}"
        found = own.responses(BLS, text_input=prompt, max_tokens=60, stream=True, temperature=2.0)
        own.close()
        assert (" " + prompt) * 2 in text_of(found)
        assert text_of(found) in (" " + prompt) * 60

    with ThreadPoolExecutor(64) as threads:
        for done in [threads.submit(one, number % 64) for number in range(3 * 64)]:
            done.result()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "", "max_tokens": 4}, "the prompt is empty"),
        ({"text_input": "the", "max_tokens": 0}, "an output of 0 tokens was asked for"),
        ({"text_input": b"\xff\xfe the", "max_tokens": 4}, "not valid UTF-8"),
        ({"text_input": "the", "max_tokens": 4, "stop_words": [b"\xff"]}, "stop_words is not valid UTF-8"),
        ({"text_input": "the " * 600, "max_tokens": 4}, "the engine takes at most 512"),
        ({"text_input": "the quick " * 50_000, "max_tokens": 4}, "the engine takes at most 512"),
        ({"text_input": "the", "max_tokens": 4000}, "more than the 2048"),
        ({"text_input": "the", "max_tokens": 4, "beam_width": 2, "stream": True}, "beam"),
        ({"text_input": "the", "max_tokens": 4.5}, "INT32"),
        ({"text_input": "the"}, "max_tokens"),
        ({"text_input": "the", "max_tokens": 4, "embedding_bias_words": "fox"}, "same number of entries"),
        ({"text_input": "the", "max_tokens": 6, "seed": 14}, "bad place"),
        ({"text_input": "the", "max_tokens": 6, "seed": 13}, "bad place"),
        ({"text_input": "the", "max_tokens": 6, "seed": 13, "stream": True}, "bad place"),
    ],
)
def test_a_wrong_request_gets_one_clear_line_and_the_next_is_fine(
    stream: Stream, inputs: dict[str, Any], message: str
) -> None:
    text = stream.error(BLS, **inputs)
    assert message in text
    assert "\n" not in text and "/opt/" not in text and "Traceback" not in text
    assert text_of(stream.responses(BLS, text_input="the fox", max_tokens=2)) == " the fox"


def test_a_client_that_leaves_stops_the_engine_within_five_steps(echo_server: dict[str, Any]) -> None:
    """Steps of 100 ms, as long as it is between two looks for clients that left."""
    before = ended(echo_server)
    own = Stream(echo_server["urls"]["grpc"])
    own.ask(BLS, text_input="the quick brown fox", max_tokens=1500, stream=True, temperature=100.0)
    for _ in range(10):
        own.next()
    own.close(cancel=True)
    note = steps_of_last(echo_server, before)
    assert note["stopped"] and note["steps"] <= 15


def test_a_client_that_leaves_before_the_first_token_stops_the_engine_too(echo_server: dict[str, Any]) -> None:
    before = ended(echo_server)
    own = Stream(echo_server["urls"]["grpc"])
    own.ask(BLS, text_input="the quick brown fox", max_tokens=300, temperature=20.0)  # not streamed: 6 s of silence
    time.sleep(0.2)
    own.close(cancel=True)
    note = steps_of_last(echo_server, before)
    assert note["stopped"] and note["steps"] < 100


def test_a_stop_with_its_id_ends_a_request_and_its_engine(echo_server: dict[str, Any], stream: Stream) -> None:
    """Order alone is judged: what was stopped ends before its 1,500 tokens, with its final flag and no error."""
    before = ended(echo_server)
    stream.ask(BLS, "the one", text_input="the fox", max_tokens=1500, stream=True, temperature=20.0)
    stream.next()
    other = stream.another()
    other.ask(BLS, "another", text_input="x", max_tokens=1, stop=True)
    assert other.next() == ({}, None, True)  # an unknown id is no error
    other.ask(BLS, "the one", text_input="x", max_tokens=1, stop=True)
    assert other.next() == ({}, None, True)
    pieces = 0
    while True:
        outputs, error, final = stream.next()
        assert error is None
        pieces += bool(outputs)
        if final:
            break
    note = steps_of_last(echo_server, before)
    assert note["stopped"] and note["steps"] < 1500 and pieces <= note["steps"]
    assert "must have the request id" in other.error(BLS, text_input="x", max_tokens=1, stop=True)
    other.close()


def test_a_stop_right_behind_its_request_leaves_no_stream_open(stream: Stream) -> None:
    """Both can reach the model together; each is answered, with its final flag, and nothing else hangs on it."""
    other = stream.another()
    for number in range(40):
        stream.ask(BLS, f"now {number}", text_input="the fox", max_tokens=1500, stream=True, temperature=20.0)
        other.ask(BLS, f"now {number}", text_input="x", max_tokens=1, stop=True)
    ends = [0, 0]
    for place, one in enumerate((other, stream)):
        while ends[place] < 40:
            if place:  # those whose stop came first
                for number in range(40):
                    other.ask(BLS, f"now {number}", text_input="x", max_tokens=1, stop=True)
            _, error, final = one.next()
            assert error is None
            ends[place] += final
    other.close()


def test_a_client_that_leaves_makes_room_for_another(tmp_path: Path) -> None:
    """Room for two at work and one that waits: a fourth is refused until one of the three has left."""
    repository = hand_made.echo_repository(tmp_path, bls_max_concurrency=2, max_queue_size=1)
    with server(repository) as document:
        three = [Stream(document["urls"]["grpc"]) for _ in range(3)]
        for one in three:
            one.ask(BLS, text_input="the fox", max_tokens=1500, stream=True, temperature=20.0)
            one.next()
        assert "Exceeds maximum queue size of 1" in three[0].error(BLS, text_input="the fox", max_tokens=2)
        three.pop().close(cancel=True)
        deadline = time.monotonic() + 20
        error: str | None = "not asked yet"
        while error is not None and time.monotonic() < deadline:
            late = three[0].another()
            late.ask(BLS, text_input="the fox", max_tokens=2)
            error = late.next()[1]
            late.close()
        assert error is None
        for one in three:
            one.close(cancel=True)


def test_what_is_more_than_cap_and_queue_is_refused_and_the_rest_completes(tmp_path: Path) -> None:
    repository = hand_made.echo_repository(tmp_path, bls_max_concurrency=2, max_queue_size=3)
    with server(repository) as document:
        streams = [Stream(document["urls"]["grpc"]) for _ in range(10)]
        for one in streams:
            one.ask(BLS, text_input="the fox", max_tokens=40, stream=True, temperature=25.0)
        texts, refusals = [], []
        for one in streams:
            text = ""
            while True:
                outputs, error, final = one.next()
                if error is not None:
                    refusals.append(error)
                    break
                text += outputs["text_output"][0].decode() if outputs else ""
                if final:
                    texts.append(text)
                    break
            one.close()
        assert texts == [" the fox" * 20] * 5
        assert refusals == ["Exceeds maximum queue size of 3"] * 5


def test_sigterm_lets_streams_in_flight_finish(tmp_path: Path) -> None:
    repository = hand_made.echo_repository(tmp_path, max_batch_size=16)
    with server(repository) as document:
        streams = [Stream(document["urls"]["grpc"]) for _ in range(16)]
        begun = threading.Barrier(17)
        texts: list[str] = []

        def read(own: Stream) -> None:
            own.ask(BLS, text_input="the fox", max_tokens=150, stream=True, temperature=20.0)
            text = own.next()[0]["text_output"][0].decode()
            begun.wait(30)
            while True:
                outputs, error, final = own.next()
                assert error is None
                text += outputs["text_output"][0].decode() if outputs else ""
                if final:
                    break
            texts.append(text)
            own.close()  # a stream that stays open keeps Triton 2.51 alive until its exit timeout

        readers = [threading.Thread(target=read, args=(own,)) for own in streams]
        for reader in readers:
            reader.start()
        begun.wait(30)
        document["process"].send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(60)
        assert document["process"].wait(60) == 0
        assert texts == [" the fox" * 75] * 16
