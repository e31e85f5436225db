"""The ensemble in the real server over the echo engine: exact where it is whole, and what its streams lose."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serving import Stream, text_of

pytestmark = pytest.mark.server

ENSEMBLE = "ensemble"


@pytest.fixture
def stream(echo_server: dict[str, Any]) -> Any:
    one = Stream(echo_server["urls"]["grpc"])
    yield one
    one.close()


def test_a_whole_answer_is_exact(stream: Stream) -> None:
    prompt = "the quick  brown fox é 日 ☃"
    found = stream.responses(ENSEMBLE, text_input=prompt, max_tokens=60, exclude_input_in_output=True)
    assert text_of(found) in (prompt + " ") * 60  # exact but for the very first space, which has no prompt before it
    told = stream.responses(ENSEMBLE, text_input="the fox", max_tokens=4, exclude_input_in_output=False)
    assert text_of(told) == "the fox the fox the fox"


def test_what_a_stream_loses_is_known(stream: Stream) -> None:
    found = stream.responses(ENSEMBLE, text_input="the ☃ fox", max_tokens=6, stream=True)
    pieces = [response["text_output"][0].decode() for response in found]
    # "☃" is three bytes, each an id of its own; every id is decoded by itself.
    assert pieces == ["the", "", "\ufffd", "\ufffd", "\ufffd", "fox"]


def test_inputs_of_a_request_reach_the_engine_and_its_outputs_the_client(stream: Stream) -> None:
    found = stream.responses(
        ENSEMBLE, text_input="the quick brown", max_tokens=6, num_return_sequences=2, return_log_probs=True,
        return_num_output_tokens=True, stream=False, exclude_input_in_output=True,
    )  # fmt: skip
    assert [int(r["sequence_index"].item()) for r in found] == [0, 1]
    assert [r["output_log_probs"].shape for r in found] == [(1, 1, 6)] * 2
    assert [int(r["num_output_tokens"].item()) for r in found] == [6, 6]


def test_a_wrong_prompt_is_refused_by_preprocessing(stream: Stream) -> None:
    for inputs, message in (
        ({"text_input": "", "max_tokens": 4}, "the prompt is empty"),
        ({"text_input": "the " * 600, "max_tokens": 4}, "takes at most 512"),
        ({"text_input": b"\xff", "max_tokens": 4}, "not valid UTF-8"),
    ):
        assert message in stream.error(ENSEMBLE, **inputs)
    assert text_of(stream.responses(ENSEMBLE, text_input="the", max_tokens=1)) == "the"


def test_streams_stay_in_order_with_three_instances_of_postprocessing(echo_server: dict[str, Any]) -> None:
    def one(_: int) -> str:
        own = Stream(echo_server["urls"]["grpc"])
        found = own.responses(ENSEMBLE, text_input="the quick brown fox jumps", max_tokens=100, stream=True)
        own.close()
        return text_of(found)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(one, range(16))) == {"thequickbrownfoxjumps" * 20}


def test_preprocessing_by_itself_gives_ids_lengths_and_word_lists(stream: Stream) -> None:
    inputs = {"QUERY": "the fox", "REQUEST_OUTPUT_LEN": 5, "STOP_WORDS_DICT": ["fox"]}
    result = stream.infer("preprocessing", **inputs)
    assert result["REQUEST_INPUT_LEN"].tolist() == [[2]]
    assert result["REQUEST_OUTPUT_LEN"].tolist() == [[5]]
    assert result["OUT_END_ID"].tolist() == [[3]] and result["OUT_PAD_ID"].tolist() == [[1]]
    assert result["STOP_WORDS_IDS"].shape[:2] == (1, 2)
    assert result["BAD_WORDS_IDS"].shape == (1, 2, 0)
    assert result["EMBEDDING_BIAS"].shape == (1, 0)
    back = stream.infer(
        "postprocessing", TOKENS_BATCH=result["INPUT_ID"][:, None, :], SEQUENCE_LENGTH=np.array([[2]], np.int32)
    )
    assert back["OUTPUT"].tolist() == [b"the fox"]
