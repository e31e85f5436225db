"""What a server says of itself against what was meant; log lines are those that people posted of TensorRT-LLM."""

from __future__ import annotations

from typing import Any

import pytest

from golden_repositories import GOLDEN
from minitron import recipe
from minitron.checks import FAIL, PASS, SKIPPED
from minitron.prometheus import Metrics
from minitron_build.plan.engine_plan import plan
from minitron_build.plan.model import look_up
from minitron_triton.audit.judging import InspectedServer, judge_all
from minitron_triton.audit.runtime_log import RuntimeLog
from minitron_triton.repository import config_text

#: NVIDIA/TensorRT-LLM pull request 4028 and issue 2398, and a benchmark log of 0.12 (sizes as printed there).
POSTED = """
[TensorRT-LLM][INFO] TRTGptModel maxNumSequences: 64
[TensorRT-LLM][INFO] TRTGptModel maxBatchSize: 64
[TensorRT-LLM][INFO] TRTGptModel maxBeamWidth: 1
[TensorRT-LLM][INFO] TRTGptModel maxSequenceLen: 384
[TensorRT-LLM][INFO] TRTGptModel mMaxAttentionWindowSize: (384) * 12
[TensorRT-LLM][INFO] TRTGptModel normalizeLogProbs: 1
[TensorRT-LLM][INFO] TRTGptModel maxNumTokens: 384
[TensorRT-LLM][INFO] TRTGptModel maxInputLen: 383  = maxSequenceLen - 1 since chunked context is enabled
[TensorRT-LLM][INFO] Capacity Scheduler Policy: GUARANTEED_NO_EVICT
[TensorRT-LLM][INFO] Loaded engine size: 240 MiB
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 1152.01 MiB for execution context memory.
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 1.14 GB GPU memory for runtime buffers.
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 4.35 GB GPU memory for decoder.
[TensorRT-LLM][INFO] Number of blocks in KV cache primary pool: 4607
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 62.99 GiB for max tokens in paged KV cache (294848).
[TensorRT-LLM][WARNING] gpu_device_ids is not specified, will be automatically set
[TensorRT-LLM][WARNING] kv_cache_free_gpu_mem_fraction is not specified, will use default value of 0.9 or max_tokens_in_paged_kv_cache
[TensorRT-LLM][WARNING] batch_scheduler_policy parameter was not found or is invalid (must be max_utilization or guaranteed_no_evict)
""".splitlines()  # noqa: E501


def test_posted_logs_are_read() -> None:
    log = RuntimeLog.parse(POSTED)
    assert log.engine_bytes == 240 << 20
    assert log.workspace_bytes == {
        "execution context": int(1152.01 * (1 << 20)), "runtime buffers": int(1.14 * (1 << 30)),
        "decoder": int(4.35 * (1 << 30)),
    }  # fmt: skip
    assert (log.kv_cache_tokens, log.kv_cache_bytes) == (294848, int(62.99 * (1 << 30)))
    assert log.limits == {"maxBatchSize": 64, "maxBeamWidth": 1, "maxSequenceLen": 384, "normalizeLogProbs": 1,
                          "maxNumTokens": 384, "maxInputLen": 383}  # fmt: skip
    assert log.scheduler_policy == "GUARANTEED_NO_EVICT"
    assert set(log.not_read) == {"gpu_device_ids", "kv_cache_free_gpu_mem_fraction", "batch_scheduler_policy"}


def test_of_several_ranks_the_largest_engine_and_the_smallest_cache_count() -> None:
    log = RuntimeLog.parse(
        [*POSTED, "Loaded engine size: 250 MiB", "Allocated 1.0 GiB for max tokens in paged KV cache (9)"]
    )
    assert (log.engine_bytes, log.kv_cache_tokens) == (250 << 20, 9)


def running(log: RuntimeLog, **served: Any) -> InspectedServer:
    """A server of recipe a100-int8 at the full 4B shape, which holds what was rendered unless ``served`` says else."""
    planned = plan(wanted := recipe.load("a100-int8", {}).recipe, look_up(wanted.model)).document()
    config = config_text.parse((GOLDEN / "a100-int8" / "tensorrt_llm" / "config.pbtxt").read_text(), "golden")
    config.parameters["kv_cache_free_gpu_mem_fraction"].string_value = str(planned["kv_cache_free_gpu_mem_fraction"])
    loaded = {
        "parameters": {key: {"string_value": value.string_value} for key, value in config.parameters.items()},
        "max_batch_size": config.max_batch_size, "model_transaction_policy": {"decoupled": True},
    }  # fmt: skip
    return InspectedServer(config, loaded | served, log, Metrics(()), {"limits": planned["limits"], "plan": planned})


def log_of(**changes: Any) -> RuntimeLog:
    """What the runtime would say if the plan of a100-int8 held: 5.77 GB of weights, 71,014 tokens, 1.85 GB beside."""
    said: dict[str, Any] = {
        "engine_bytes": 5_770_000_000, "workspace_bytes": {"execution context": 1_500_000_000},
        "kv_cache_bytes": 9_300_000_000, "kv_cache_tokens": 71_000, "limits": {"maxBatchSize": 32},
        "scheduler_policy": "GUARANTEED_NO_EVICT", "not_read": {},
    }  # fmt: skip
    return RuntimeLog(**said | changes)


def status(judged: InspectedServer) -> dict[str, str]:
    return {line.name.partition(".")[2]: line.verdict for line in judge_all(judged)}


def test_a_server_as_planned_passes() -> None:
    assert set(status(running(log_of())).values()) == {PASS}


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("weights", {"engine_bytes": 5_770_000_000 // 2}),
        ("weights", {"engine_bytes": 5_770_000_000 * 2}),
        ("workspace", {"workspace_bytes": {"execution context": 1_500_000_000, "decoder": 1_000_000_000}}),
        ("kv_tokens", {"kv_cache_tokens": 71_000 // 2}),
        ("parameters", {"limits": {"maxBatchSize": 16}}),
        ("parameters", {"limits": {"maxBeamWidth": 4}}),
        ("parameters", {"limits": {"maxInputLen": 1024}}),
        ("parameters", {"scheduler_policy": "MAX_UTILIZATION"}),
        ("parameters", {"not_read": {"enable_kv_cache_reuse": "is not specified, will be set to true"}}),
    ],
)
def test_what_is_off_fails_its_line_alone(line: str, changes: dict[str, Any]) -> None:
    found = status(running(log_of(**changes)))
    assert [name for name, verdict in found.items() if verdict == FAIL] == [line]


@pytest.mark.parametrize(
    "served",
    [
        {"max_batch_size": 1},
        {"model_transaction_policy": {}},
        {"dynamic_batching": {"default_queue_policy": {"max_queue_size": 256}}},
        {"parameters": {"gpt_model_type": {"string_value": "V1"}}},
    ],
)
def test_a_config_that_the_server_has_otherwise_fails(served: dict[str, Any]) -> None:
    assert status(running(log_of(), **served))["parameters"] == FAIL


def test_what_the_log_does_not_say_is_skipped_and_not_passed() -> None:
    silent = log_of(engine_bytes=None, workspace_bytes={}, kv_cache_tokens=None, limits={}, scheduler_policy=None)
    assert status(running(silent)) == {
        "parameters": SKIPPED, "weights": SKIPPED, "workspace": SKIPPED, "kv_tokens": SKIPPED
    }  # fmt: skip
