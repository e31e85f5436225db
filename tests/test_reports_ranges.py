"""Corners of number ranges (TensorRT-LLM#15715, tensorrtllm_backend#237, and their kind): situation, source, expected.

Requests go the way of a Triton request's tensors (``request_tensors``) into the CPU engine of the model "other". What
is expected comes from transformers' greedy tokens (EXPECTED), from the numpy Nemotron's logits (``next_logits``), or
from another request that means the same by TensorRT-LLM's own rules; the source of each rule stands beside it:

* samplingConfig.cpp (cpp/tensorrt_llm/executor): what its checks refuse
* penaltyKernels.cu (cpp/tensorrt_llm/kernels): temperature and penalties
* utils.cc (triton_backend/inflight_batcher_llm/src): which tensors count as not given
* topKSamplingLayer.cu (cpp/tensorrt_llm/layers): top k and top p that are 0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpu_engines import EXPECTED, PROMPTS, Caller, next_logits, run
from minitron_triton.models.tensorrt_llm import pipeline, request_tensors
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation_request import Refused, Request

VOCABULARY = 1031
TINY, SMALLEST_NORMAL, LARGEST = 1e-45, 1.17549435e-38, 3.4028235e38  # of float32; the first is its least denormal
NAN, INF = float("nan"), float("inf")
INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
TYPES = {"seed": np.uint64, "temperature": np.float32, "runtime_top_p": np.float32, "repetition_penalty": np.float32,
         "presence_penalty": np.float32, "frequency_penalty": np.float32, "runtime_top_p_decay": np.float32,
         "runtime_top_p_min": np.float32, "len_penalty": np.float32}  # fmt: skip
LENGTH = 8
GREEDY = EXPECTED[0][:LENGTH]


def request(**values: Any) -> Request:
    """The request that these tensors make, for the first prompt; scalars in the types that the model declares."""
    asked = {"request_output_len": LENGTH, **values}
    tensors = {name: np.array([value], TYPES.get(name, np.int32)) for name, value in asked.items()}
    tensors["input_ids"] = np.array([PROMPTS[0]], np.int32)
    return request_tensors.read(tensors, decoupled=True, exclude_input=True).rows[0][0]


GREEDY_CASES: list[tuple[str, dict[str, Any]]] = [
    ("penaltyKernels.cu: logits x 1 / (T + 1e-6)", {"temperature": 1e-38, "runtime_top_k": 50}),
    ("penaltyKernels.cu", {"temperature": TINY, "runtime_top_k": 50}),
    ("penaltyKernels.cu", {"temperature": TINY, "runtime_top_p": 0.9}),
    ("penaltyKernels.cu", {"temperature": TINY, "runtime_top_k": 50, "runtime_top_p": 0.9}),
    ("penaltyKernels.cu", {"temperature": SMALLEST_NORMAL, "runtime_top_k": VOCABULARY}),
    ("penaltyKernels.cu", {"temperature": 1e-12, "runtime_top_k": INT32_MAX}),
    ("penaltyKernels.cu: 0 is the least", {"temperature": 0.0, "runtime_top_k": 50}),
    ("penaltyKernels.cu: -0 is 0", {"temperature": -0.0, "runtime_top_k": 50}),
    ("topKSamplingLayer.cu: neither is top_k 1", {"temperature": LARGEST}),
    ("topKSamplingLayer.cu", {"runtime_top_k": 0, "runtime_top_p": 0.0}),
    ("utils.cc: top_p that is not above 0 is dropped", {"runtime_top_p": -0.5}),
    ("utils.cc", {"runtime_top_p": -INF}),
    ("utils.cc", {"runtime_top_p": -0.0}),
    ("the nucleus of 1e-9 is the best token", {"runtime_top_p": 1e-9}),
    ("the nucleus of the least number is, too", {"runtime_top_p": TINY}),
    ("so it is among the top k", {"runtime_top_p": 1e-9, "runtime_top_k": 50}),
    ("one candidate", {"runtime_top_k": 1, "temperature": LARGEST}),
    ("samplingConfig.cpp: any number above 0 is a penalty, 1 is none", {"repetition_penalty": 1.0}),
    ("penaltyKernels.cu: 0 is no penalty, and so is -0", {"presence_penalty": -0.0, "frequency_penalty": 0.0}),
    ("utils.cc: an end id below 0 is none", {"end_id": INT32_MIN}),
    ("without an end nothing is held back", {"min_tokens": LENGTH}),
    ("no top-p sampling, so it means nothing", {"runtime_top_p_min": NAN}),
    ("no beams, so it means nothing", {"len_penalty": -INF}),
]


@pytest.mark.parametrize(("source", "values"), GREEDY_CASES, ids=[str(values) for _, values in GREEDY_CASES])
def test_it_takes_the_best_token_each_time(engine: Engine, source: str, values: dict[str, Any]) -> None:
    seeds = (0, 1, 7)
    assert run(engine, *(request(**values, seed=seed) for seed in seeds)) == [GREEDY] * len(seeds), source


SAME_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("all of the vocabulary are candidates", {"runtime_top_k": INT32_MAX}, {"runtime_top_k": VOCABULARY}),
    ("and one more than all", {"runtime_top_k": VOCABULARY + 1}, {"runtime_top_k": VOCABULARY}),
    ("topKSamplingLayer.cu: top_p 1 leaves all", {"runtime_top_p": 1.0}, {"runtime_top_k": VOCABULARY}),
    ("topKSamplingLayer.cu: top_p 0 beside a top_k is 1", {"runtime_top_k": 9, "runtime_top_p": 0.0},
     {"runtime_top_k": 9, "runtime_top_p": 1.0}),
    ("samplingConfig.cpp: any number above 0 is a penalty, however large", {"repetition_penalty": 1e28},
     {"repetition_penalty": 1e6}),
    ("or small", {"repetition_penalty": 1e-28}, {"repetition_penalty": 1e-6}),
    ("a temperature of 1 is none", {"temperature": 1.0, "runtime_top_k": 50}, {"runtime_top_k": 50}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "values", "same"), SAME_CASES, ids=[f"{values} as {same}" for _, values, same in SAME_CASES]
)
def test_it_means_the_same(engine: Engine, source: str, values: dict[str, Any], same: dict[str, Any]) -> None:
    seeds = range(3)
    found = run(engine, *(request(**values, seed=seed) for seed in seeds))
    assert found == run(engine, *(request(**same, seed=seed) for seed in seeds)), source
    assert found[0] != GREEDY


@pytest.mark.parametrize("temperature", [1e10, LARGEST])
def test_a_huge_temperature_makes_all_candidates_equal(engine: Engine, temperature: float) -> None:
    """64 seeds among the three best of the numpy Nemotron: each comes 21 times on average; less than 8 times or more
    than 36 has a chance of one in 2,000 (binomial, 64 draws of 1/3)."""
    best = np.argsort(next_logits(list(PROMPTS[0])))[-3:].tolist()
    values = {"temperature": temperature, "runtime_top_k": 3, "request_output_len": 1}
    tokens = [tokens[0] for tokens in run(engine, *(request(**values, seed=seed) for seed in range(64)))]
    assert set(tokens) == set(best)
    assert all(8 <= tokens.count(token) <= 36 for token in best)


REFUSED_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("samplingConfig.cpp: checkTemperature", {"temperature": -TINY}, "is -1.4013e-45: it must be at least 0"),
    ("samplingConfig.cpp: NaN fails every comparison", {"temperature": NAN}, "temperature is nan"),
    ("no number to divide by", {"temperature": INF}, "temperature is inf"),
    ("samplingConfig.cpp: checkTopP", {"runtime_top_p": 1.0000001}, "top_p is 1: it must be from 0 to 1"),
    ("samplingConfig.cpp: checkTopP", {"runtime_top_p": INF}, "top_p is inf"),
    ("samplingConfig.cpp: checkTopP", {"runtime_top_p": NAN}, "top_p is nan"),
    ("samplingConfig.cpp: checkTopK", {"runtime_top_k": INT32_MIN}, "top_k is -2147483648"),
    ("samplingConfig.cpp: checkRepetitionPenalty", {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ("samplingConfig.cpp: checkRepetitionPenalty", {"repetition_penalty": -0.0}, "repetition_penalty is -0"),
    ("samplingConfig.cpp: checkRepetitionPenalty", {"repetition_penalty": NAN}, "repetition_penalty is nan"),
    ("penaltyKernels.cu: the logit overflows", {"repetition_penalty": TINY}, "it must be from 1e-28 to 1e\\+28"),
    ("penaltyKernels.cu: the logit overflows", {"repetition_penalty": LARGEST}, "it must be from 1e-28 to 1e\\+28"),
    ("penaltyKernels.cu counts the prompt", {"presence_penalty": 0.5}, "presence_penalty is 0.5: .* not supported"),
    ("penaltyKernels.cu counts the prompt", {"presence_penalty": TINY}, "presence_penalty is 1.4013e-45"),
    ("penaltyKernels.cu counts the prompt", {"frequency_penalty": -2.0}, "frequency_penalty is -2"),
    ("penaltyKernels.cu counts the prompt", {"frequency_penalty": NAN}, "frequency_penalty is nan"),
    ("samplingConfig.cpp: checkTopPDecay", {"runtime_top_p_decay": NAN}, "runtime_top_p_decay .* not supported"),
    ("samplingConfig.cpp: checkNoRepeatNgramSize", {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ("samplingConfig.cpp: checkBeamWidth", {"beam_width": 0}, "beam_width is 0"),
    ("samplingConfig.cpp: checkNumReturnSequences", {"num_return_sequences": INT32_MIN}, "num_return_sequences is -"),
    ("a number that memory could not hold", {"num_return_sequences": INT32_MAX}, "it must be from 1 to 1024"),
    ("samplingConfig.cpp: checkMinTokens", {"min_tokens": -1}, "min_tokens is -1"),
    ("more than there can be", {"min_tokens": INT32_MAX}, "min_tokens is 2147483647"),
    ("the engine's longest sequence", {"request_output_len": INT32_MAX}, "exceed the maximum sequence length"),
    ("an answer of nothing", {"request_output_len": INT32_MIN}, "request_output_len is -2147483648"),
    ("no such token", {"end_id": VOCABULARY}, "end_id is 1031"),
    ("no such token", {"end_id": INT32_MAX}, "end_id is 2147483647"),
    ("not the prompt's length", {"input_lengths": INT32_MIN}, "input_lengths is -2147483648"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "values", "text"), REFUSED_CASES, ids=[str(values) for _, values, _ in REFUSED_CASES]
)
def test_it_is_refused_by_name_and_the_engine_goes_on(
    engine: Engine, source: str, values: dict[str, Any], text: str
) -> None:
    with pytest.raises(Refused, match=text):
        Caller(engine, request(**values))
    assert run(engine, request(request_output_len=2)) == [GREEDY[:2]], source


def test_every_bit_of_a_seed_counts(engine: Engine) -> None:
    """The tensor is UINT64; OpenVINO GenAI seeds a std::mt19937 with the lower 32 bits alone."""
    sampled = {"runtime_top_k": 500, "temperature": 2.0}
    seeds = [0, *(1 << bit for bit in range(64)), 2**64 - 1]
    tokens = run(engine, *(request(**sampled, seed=seed) for seed in seeds))
    assert len(set(map(tuple, tokens))) == len(seeds)
    # Not held against the run before: with another number of sequences in a step the last bits of the logits differ
    # on processors without AVX-512, and of 66 samples at this temperature one may be another.
    once, again = (run(engine, *(request(**sampled, seed=seed) for seed in seeds[-3:])) for _ in range(2))
    assert once == again


def test_seeds_that_share_a_half_never_meet_and_small_ones_stay_themselves() -> None:
    """Own arithmetic: an odd factor has an inverse modulo 2**32, and so has a shifted xor."""
    halves = [0, 1, 2, 0x9E3779B1, 2**31, 2**32 - 1, *range(1000, 1200)]
    assert [pipeline.seed_of_32_bits(low) for low in halves] == halves
    for fixed in halves:
        assert len({pipeline.seed_of_32_bits(fixed << 32 | low) for low in halves}) == len(halves)
        assert len({pipeline.seed_of_32_bits(high << 32 | fixed) for high in halves}) == len(halves)


def test_the_seeds_of_further_sequences_wrap_around() -> None:
    tensors = {"input_ids": np.array([[5]]), "num_return_sequences": np.array([3]),
               "seed": np.array([2**64 - 2], np.uint64)}  # fmt: skip
    wanted = request_tensors.read(tensors, decoupled=True, exclude_input=True)
    assert [one.seed for one in wanted.rows[0]] == [2**64 - 2, 2**64 - 1, 0]
