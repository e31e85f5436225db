"""The CPU engine inside the real Triton, spoken to as ``tensorrt_llm``. Expected tokens are transformers' own; shapes,
names and manners are those of the tensor contract (data/triton_tensors.json) and of TensorRT-LLM's C++ backend. What
both engines have to do is in the behaviour suite (test_clients_conformance.py); here is what needs this one to show.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import serving
from answers import END_ID, Answers
from conftest import DATA
from minitron.artifacts import manifest
from minitron.model.precision import Precision
from minitron_triton.server import leftovers
from serving import Stream

pytestmark = pytest.mark.server

ANSWERS = Answers.load("small")
PROMPTS, EXPECTED = ANSWERS.prompts, ANSWERS.variants[Precision.BFLOAT16].continuations
MODEL = "tensorrt_llm"


def tensors(prompt: list[int], output_len: int, **more: Any) -> dict[str, Any]:
    """The inputs of a request for one prompt."""
    ids = np.array([prompt], np.int32)
    return {"input_ids": ids, "input_lengths": len(prompt), "request_output_len": output_len, **more}


def words(*lists: list[int]) -> Any:
    """A word list in the backend's layout, [1, 2, n]."""
    flat = [token for word in lists for token in word]
    ends = np.cumsum([len(word) for word in lists]).tolist()
    return np.array([[flat, ends + [-1] * (len(flat) - len(ends))]], np.int32)


@pytest.fixture
def stream(server: dict[str, Any]) -> Iterator[Stream]:
    opened = Stream(server["urls"]["grpc"])
    yield opened
    opened.close()


def ids_of(responses: list[dict[str, Any]]) -> list[int]:
    return [int(token) for response in responses for token in response["output_ids"].reshape(-1)]


def metrics(server: dict[str, Any]) -> dict[str, float]:
    """Prometheus samples of the engine's families by name and labels."""
    text = urllib.request.urlopen(f"http://{server['urls']['metrics']}/metrics", timeout=10).read().decode()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("nv_trt_llm", "nv_llm"))
    }


def settled_metrics(server: dict[str, Any]) -> dict[str, float]:
    """Metrics after what came before is counted: they are updated every 100 ms, and stand still when nothing runs."""
    while True:
        found = metrics(server)
        time.sleep(0.5)
        if found == metrics(server):
            return found


ACTIVE = 'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"}'
STEPS = 'nv_trt_llm_general_metrics{general_type="iteration_counter",model="tensorrt_llm",version="1"}'
MEMORY = 'nv_trt_llm_runtime_memory_metrics{memory_type="cpu",model="tensorrt_llm",version="1"}'
OUTPUT = 'nv_llm_output_token_len_sum{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"}'


def test_sixteen_streams_at_once_each_give_transformers_tokens_one_by_one(server: dict[str, Any]) -> None:
    streams = [Stream(server["urls"]["grpc"]) for _ in range(16)]
    try:
        for number, stream in enumerate(streams):
            stream.ask(MODEL, **tensors(PROMPTS[number], 64, streaming=True, end_id=END_ID))
        for number, stream in enumerate(streams):
            found: list[dict[str, Any]] = []
            final = False
            while not final:
                outputs, error, final = stream.next()
                assert error is None
                found.append(outputs)
            assert ids_of(found) == EXPECTED[number]
            assert [int(part["sequence_length"][0, 0]) for part in found] == [1] * 64
            assert all(set(part) == {"output_ids", "sequence_length"} for part in found)
            assert found[0]["output_ids"].shape == (1, 1, 1)  # batch, beams, tokens
    finally:
        for stream in streams:
            stream.close()


def test_requests_that_come_together_are_all_handed_on_at_once(server: dict[str, Any]) -> None:
    """60 bursts of four streams: by order, not by the clock.

    A request was held when 250 questions of a client to another model of the server, one after the other, were
    answered before the engine had it, and with the engine at rest all the while: after the last token of whoever came
    before. (Linux has one monotonic clock for both.) A queue policy held requests of 14 of 60 bursts for up to half a
    second (contract, 5.1).
    """
    streams, witness = [Stream(server["urls"]["grpc"]) for _ in range(4)], Stream(server["urls"]["grpc"])
    held = []
    try:
        for burst in range(60):
            answered = [time.monotonic_ns()]
            for stream in streams:
                stream.ask(MODEL, **tensors([5, 6, 7], 1, return_perf_metrics=True))
            while not all(stream.has_answer for stream in streams):
                witness.infer("preprocessing", QUERY="In", REQUEST_OUTPUT_LEN=1)
                answered.append(time.monotonic_ns())
            answers = [last_of(stream) for stream in streams]
            tokens = [answer["last_token_time_ns"].item() for answer in answers]
            for arrival in (answer["arrival_time_ns"].item() for answer in answers):
                rest = max([answered[0], *(token for token in tokens if token < arrival)])
                held += [burst] * (sum(rest < moment < arrival for moment in answered) >= 250)
    finally:
        for stream in (*streams, witness):
            stream.close()
    assert held == []


def last_of(stream: Stream) -> dict[str, Any]:
    """The last response with outputs to what was asked."""
    last: dict[str, Any] = {}
    final = False
    while not final:
        outputs, error, final = stream.next()
        assert error is None, error
        last = outputs or last
    return last


def test_several_sequences_have_an_index_and_the_seeds_that_follow(stream: Stream) -> None:
    """Each is what a request of its own with that seed gives."""
    sampling = {"runtime_top_k": 50, "temperature": 1.3, "exclude_input_in_output": True}
    responses = stream.responses(MODEL, **tensors(PROMPTS[0], 12, num_return_sequences=3, seed=40, **sampling))
    found = {int(part["sequence_index"][0, 0]): ids_of([part]) for part in responses}
    single = {n: ids_of(stream.responses(MODEL, **tensors(PROMPTS[0], 12, seed=40 + n, **sampling))) for n in range(3)}
    assert found == single
    assert len(set(map(tuple, found.values()))) > 1


def test_more_is_told_only_on_request(stream: Stream) -> None:
    """Names, types and shapes of every output that a text model can give; time only goes forward."""
    contract = json.loads((DATA / "triton_tensors.json").read_text())["models"][MODEL]["outputs"]
    types = {output["name"]: output["dtype"] for output in contract}
    switches = ("return_log_probs", "return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens")
    before = time.monotonic_ns()
    parts = stream.responses(MODEL, **tensors(PROMPTS[0], 6, streaming=True), **dict.fromkeys(switches, True))
    assert [int(part["num_output_tokens"][0, 0]) for part in parts] == [1] * 6  # of each response
    assert {int(part["num_input_tokens"][0, 0]) for part in parts} == {len(PROMPTS[0])}
    log_probs = [float(part["output_log_probs"][0, 0, 0]) for part in parts]
    assert all(value < 0 for value in log_probs)
    cumulated = [float(part["cum_log_probs"][0, 0]) for part in parts]
    assert np.allclose(np.cumsum(log_probs), cumulated, atol=1e-5)
    last = parts[-1]
    moments = [
        int(last[f"{name}_time_ns"][0, 0]) for name in ("arrival", "first_scheduled", "first_token", "last_token")
    ]
    assert moments == sorted(moments) and before <= moments[0] and moments[2] < moments[3]
    numpy_types = {"INT32": np.int32, "FP32": np.float32, "INT64": np.int64}
    for name, value in last.items():
        assert value.dtype == numpy_types[types[name]], name
    text_outputs = {output["name"] for output in contract if output.get("text_only_needed", True)}
    absent = {"context_logits", "generation_logits", "batch_index", "sequence_index"}
    assert set(last) == text_outputs - absent


@pytest.mark.parametrize("streaming", [False, True])
def test_the_logits_of_a_prompt_come_with_the_first_response(stream: Stream, streaming: bool) -> None:
    """Type and shape are the contract's; the judge of their values is transformers (``answers``)."""
    asked = tensors(PROMPTS[0], 3, return_context_logits=True, return_log_probs=True, streaming=streaming)
    first, *others = stream.responses(MODEL, **asked)
    logits = first["context_logits"]
    assert logits.dtype == np.float32 and logits.shape == (1, len(PROMPTS[0]), 1024)
    assert len(others) == (2 if streaming else 0) and not any("context_logits" in one for one in others)
    for row, (prompt, position) in enumerate(ANSWERS.places):
        if prompt == 0:
            assert np.abs(logits[0, position] - ANSWERS.variants[Precision.BFLOAT16].logits[row]).max() < 1e-3
    assert int(logits[0, -1].argmax()) == EXPECTED[0][0]


def test_each_prompt_and_sequence_has_its_own_logits(stream: Stream) -> None:
    ids = np.zeros((2, 8), np.int32)
    ids[0, :3], ids[1] = [5, 6, 7], range(300, 308)
    lengths, outputs = np.array([[3], [8]], np.int32), np.array([[1], [1]], np.int32)
    flags = np.array([[True], [True]])
    found = stream.responses(MODEL, input_ids=ids, input_lengths=lengths, request_output_len=outputs,
                             return_context_logits=flags)  # fmt: skip
    shapes = {int(one["batch_index"][0, 0]): one["context_logits"].shape for one in found}
    assert shapes == {0: (1, 3, 1024), 1: (1, 8, 1024)}


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": np.zeros((1, 0), np.int32), "input_lengths": 0}, "Prompt is empty"),
    ({"input_ids": np.array([[5, 1024]], np.int32), "input_lengths": 2}, "token id 1024: it must be from 0 to 1023"),
    (
        {"input_ids": np.ones((1, 2049), np.int32), "input_lengths": 2049},
        r"\(2049\) exceeds maximum input length \(2048\)",
    ),
    ({"input_lengths": 3}, "input_lengths is 3"),
    ({"request_output_len": 0}, "request_output_len is 0"),
    ({"request_output_len": 2048}, r"exceed the maximum sequence length \(2048\)"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"runtime_top_p": 1.5}, "top_p is 1.5"),
    ({"beam_width": 2}, "beam_width is 2: that is not supported by the CPU engine"),
    ({"bad_words_list": words([5, 6])}, "bad_words_list .* not supported"),
    ({"embedding_bias": np.zeros((1, 1024), np.float32)}, "embedding_bias .* not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5: that is not supported by the CPU engine"),
    ({"frequency_penalty": -0.5}, "frequency_penalty is -0.5: that is not supported by the CPU engine"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size .* not supported"),
    ({"return_generation_logits": True}, "unexpected inference input 'return_generation_logits'"),
    ({"runtime_top_p_decay": 0.5}, "runtime_top_p_decay .* not supported"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0"),
    ({"stop_words_list": np.array([[[5, 6], [2, 1]]], np.int32)}, "stop_words_list is malformed: offset 1"),
    ({"stop_words_list": np.array([[[5, 6], [-1, 2]]], np.int32)}, "stop_words_list is malformed: after the first -1"),
    ({"stop_words_list": np.array([[[5, 6], [3, -1]]], np.int32)}, "stop_words_list is malformed: offset 3"),
    ({"stop": True}, "must have the request id"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_REQUESTS)
def test_a_bad_request_gets_one_clear_line_and_the_next_one_is_fine(
    stream: Stream, changes: dict[str, Any], text: str
) -> None:
    error = stream.error(MODEL, **tensors([5, 6], 4) | changes)
    assert re.search(text, error)
    assert "\n" not in error and "Traceback" not in error and "/" not in error
    parts = stream.responses(MODEL, **tensors(PROMPTS[0], 3, exclude_input_in_output=True))
    assert ids_of(parts) == EXPECTED[0][:3]


def test_outputs_that_must_be_requested(server: dict[str, Any]) -> None:
    import tritonclient.grpc as triton

    stream = Stream(server["urls"]["grpc"])
    inputs = [serving._tensor(name, value) for name, value in tensors(PROMPTS[0], 3).items()]
    stream.client.async_stream_infer(MODEL, inputs, outputs=[triton.InferRequestedOutput("output_ids")])
    assert "sequence_length was not requested" in (stream.next()[1] or "")
    stream.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_leaves_nothing_running(server: dict[str, Any], streaming: bool) -> None:
    """Neither while it streams nor while it waits for a whole answer, where only the poll can notice."""
    before = settled_metrics(server)
    stream = Stream(server["urls"]["grpc"])
    stream.ask(MODEL, **tensors(PROMPTS[0], 2000, streaming=streaming))
    if streaming:
        stream.next()
    else:
        wait_until(lambda: metrics(server)[STEPS] > before[STEPS])
    stream.close(cancel=True)
    wait_until(lambda: metrics(server)[OUTPUT] > before[OUTPUT])
    assert metrics(server)[OUTPUT] - before[OUTPUT] < 2000
    wait_until(lambda: metrics(server)[ACTIVE] == 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_metric_families_are_those_of_the_backend_and_move(server: dict[str, Any], stream: Stream) -> None:
    """Names, label values and buckets from the tensor contract."""
    families = json.loads((DATA / "triton_tensors.json").read_text())["metrics"]
    found = metrics(server)
    for name, family in (families["gauge"] | families["counter"]).items():
        if name == "nv_trt_llm_v1_metrics":
            continue  # of the batching of version 1, which needs another engine
        for value in family["values"]:
            labels = sorted([f'{family["label"]}="{value}"', 'model="tensorrt_llm"', 'version="1"'])
            assert f"{name}{{{','.join(labels)}}}" in found
    for name, family in families["histogram"].items():
        buckets = {line.split('le="')[1].split('"')[0] for line in found if line.startswith(f"{name}_bucket")}
        assert buckets == {*map(str, family["buckets"]), "+Inf"}
    before = settled_metrics(server)
    stream.responses(MODEL, **tensors(PROMPTS[0], 7))
    wait_until(lambda: metrics(server)[OUTPUT] >= before[OUTPUT] + 7)
    wait_until(lambda: metrics(server)[STEPS] >= before[STEPS] + 7)  # counted from a look that may be one step older
    wait_until(lambda: metrics(server)[ACTIVE] == 0)


def test_the_metric_of_memory_is_what_the_engine_s_process_has(server: dict[str, Any]) -> None:
    """The judge is psutil, which multiplies the kernel's count of pages by the size of one."""
    processes = [psutil.Process(one.pid) for one in leftovers.processes(server["mark"])]
    (engine,) = (one for one in processes if any(word.endswith(f"/{MODEL}/1/model.py") for word in one.cmdline()))
    found = settled_metrics(server)[MEMORY]
    assert found == pytest.approx(engine.memory_info().rss, rel=0.02)


FAULT = """

from pathlib import Path


class _Spoiled:
    def __init__(self, real):
        self._real = real

    def step(self):
        if Path({fail!r}).exists():
            Path({fail!r}).unlink()
            raise RuntimeError("out of luck")
        if Path({slow!r}).exists():
            import time

            time.sleep(0.05)
        self._real.step()

    def __getattr__(self, name):
        return getattr(self._real, name)


_open = open_pipeline


def open_pipeline(*args, **kwargs):
    return _Spoiled(_open(*args, **kwargs))
"""


@pytest.fixture(scope="module")
def spoiled(
    small_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A server of one's own: a small KV cache, two requests may wait; a file makes one step fail, another all slow.

    Its model ``whole`` is the same engine without the decoupled policy.
    """
    folder = tmp_path_factory.mktemp("spoiled") / "repository"
    source = small_repository("bfloat16")
    shutil.copytree(source, folder, symlinks=True)
    fail, slow = folder.parent / "fail", folder.parent / "slow"
    config = (folder / MODEL / "config.pbtxt").read_text()
    room = 'parameters { key: "max_tokens_in_paged_kv_cache" value: { string_value: "4800" } }\n'
    limited = config.replace('string_value: "256"', 'string_value: "2"') + room
    assert limited != config + room
    (folder / MODEL / "config.pbtxt").write_text(limited)
    shutil.copytree(folder / MODEL, folder / "whole")
    whole = config.replace('name: "tensorrt_llm"', 'name: "whole"', 1).replace("decoupled: true", "decoupled: false", 1)
    (folder / "whole" / "config.pbtxt").write_text(whole)
    with (folder / MODEL / "1" / "pipeline.py").open("a") as code:
        code.write(FAULT.format(fail=str(fail), slow=str(slow)))
    record = manifest.read(source, "repository")
    details = record.details | {"models": [*record.details["models"], "whole"], "root": str(folder)}
    (folder / manifest.NAME).unlink()
    manifest.write(folder, "repository", record.input, arguments={}, details=details)
    with serving.server(folder) as document:
        yield document | {"fail": fail, "slow": slow}


def test_a_fault_in_a_step_is_answered_and_the_next_request_works(spoiled: dict[str, Any]) -> None:
    streams = [Stream(spoiled["urls"]["grpc"]) for _ in range(3)]
    for stream in streams:
        stream.ask(MODEL, **tensors(PROMPTS[0], 1400, streaming=True))
        assert stream.next()[1] is None
    spoiled["fail"].touch()
    for stream in streams:
        error: str | None = None
        final = False
        while not final:
            _, error, final = stream.next()
        assert error is not None
        assert re.fullmatch(
            r"Executor failed process requestId \d+ due to the following error: The engine failed: out of luck", error
        )
        stream.close()
    stream = Stream(spoiled["urls"]["grpc"])
    assert ids_of(stream.responses(MODEL, **tensors(PROMPTS[1], 64, streaming=True))) == EXPECTED[1]
    stream.close()


def test_a_cancelled_stream_stops_within_five_steps(spoiled: dict[str, Any]) -> None:
    """Steps of 50 ms, one token each; what the engine generated beyond what the client had seen is counted."""
    spoiled["slow"].touch()
    try:
        before = settled_metrics(spoiled)[OUTPUT]
        stream = Stream(spoiled["urls"]["grpc"])
        stream.ask(MODEL, **tensors(PROMPTS[0], 600, streaming=True))
        for _ in range(4):
            stream.next()
        stream.close(cancel=True)
        wait_until(lambda: metrics(spoiled)[OUTPUT] > before)
        assert 4 <= metrics(spoiled)[OUTPUT] - before <= 4 + 5
    finally:
        spoiled["slow"].unlink()


def test_a_full_queue_refuses_the_surplus_and_the_others_complete(spoiled: dict[str, Any]) -> None:
    """Room for three sequences of 1400 tokens, two more may wait."""
    streams = [Stream(spoiled["urls"]["grpc"]) for _ in range(8)]
    try:
        for stream in streams:
            stream.ask(MODEL, **tensors(PROMPTS[1], 1400, exclude_input_in_output=True))
        answers = [stream.next() for stream in streams]
    finally:
        for stream in streams:
            stream.close()
    errors = [error for _, error, _ in answers if error is not None]
    assert len(errors) == 3
    assert all("Maximum queue size of 2 has been reached, please try again later" in error for error in errors)
    done = [ids_of([outputs])[:64] for outputs, error, _ in answers if error is None]
    assert done == [EXPECTED[1]] * 5


def test_without_the_decoupled_policy_answers_come_whole_and_streaming_is_refused(spoiled: dict[str, Any]) -> None:
    stream = Stream(spoiled["urls"]["grpc"])
    parts = stream.responses("whole", **tensors(PROMPTS[0], 16, exclude_input_in_output=True))
    assert ids_of(parts) == EXPECTED[0][:16]
    error = stream.error("whole", **tensors(PROMPTS[0], 4, streaming=True))
    assert error == "Streaming is only supported if model is deployed using decoupled mode."
    error = stream.error("whole", **tensors(PROMPTS[0], 4, num_return_sequences=2))
    assert "only supported in decoupled mode" in error
    stream.close()
