"""The metric families of TensorRT-LLM's C++ backend, fed from the engine's counts by one thread.

Names, labels and buckets: triton_backend/inflight_batcher_llm/src/custom_metrics_reporter.cc. Metric calls from several
threads at once crash the server (Triton 2.51), so ``observe`` only queues and ``update`` does it all.
"""

from __future__ import annotations

import queue
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from minitron.machine.memory import status_bytes
from minitron.model.runtime_limits import TOKENS_PER_BLOCK

from .cpu_engine import Stats

_GAUGES = {
    "nv_trt_llm_request_metrics": ("request_type", "TRT LLM request metrics"),
    "nv_trt_llm_runtime_memory_metrics": ("memory_type", "TRT LLM runtime memory metrics"),
    "nv_trt_llm_kv_cache_block_metrics": ("kv_cache_block_type", "TRT LLM KV cache block metrics"),
    "nv_trt_llm_inflight_batcher_metrics": (
        "inflight_batcher_specific_metric",
        "TRT LLM inflight_batcher-specific metrics",
    ),
    "nv_trt_llm_general_metrics": ("general_type", "General TRT LLM metrics"),
}
_COUNTER = ("nv_trt_llm_disaggregated_serving_metrics", "disaggregated_serving_type", "TRT LLM disaggregated serving")
#: The toolkit's own: the C++ backend counts no drafts.
_DRAFTS = ("minitron_draft_tokens_total", "draft_type", "Tokens drafted by prompt lookup, and those of them accepted")
_LENGTHS = {
    "nv_llm_input_token_len": ("total_input_tokens", "Number of input tokens"),
    "nv_llm_output_token_len": ("total_output_tokens", "Number of output tokens"),
}
_BUCKETS = [10.0, 50.0, 100.0, 500.0, 1000.0]


class Metrics:
    """All families of one model; made once, updated by one thread."""

    def __init__(self, model: str, version: str) -> None:
        self._labels = {"model": model, "version": version}
        family = pb_utils.MetricFamily
        self._gauges = {name: family(name, about, family.GAUGE) for name, (_, about) in _GAUGES.items()}
        self._children: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._stats: Stats | None = None
        self._lengths: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._histograms = []
        for name, (kind, about) in _LENGTHS.items():
            lengths = family(name, about, family.HISTOGRAM)
            labels = self._labels | {"response_metric_type": kind}
            self._histograms.append((lengths, lengths.Metric(labels=labels, buckets=_BUCKETS)))
        name, label, about = _DRAFTS
        self._drafts_family = family(name, about, family.COUNTER)
        self._drafts = {
            kind: self._drafts_family.Metric(labels=self._labels | {label: kind}) for kind in ("drafted", "accepted")
        }
        name, label, about = _COUNTER
        self._disaggregated = family(name, about, family.COUNTER)
        self._nothing = [
            self._disaggregated.Metric(labels=self._labels | {label: kind})
            for kind in ("kv_cache_transfer_ms", "request_count")
        ]

    def observe(self, input_tokens: int, output_tokens: int) -> None:
        """Note the lengths of a finished sequence; any thread may call it."""
        self._lengths.put((input_tokens, output_tokens))

    def update(self, stats: Stats) -> None:
        """Set the gauges that moved, and count the lengths noted since the last time.

        Each call costs a message to the server, so an idle engine makes none; its gauges keep their last values.
        """
        if stats != self._stats:
            for kind, count in _drafts(stats).items():
                if more := count - (_drafts(self._stats)[kind] if self._stats else 0):
                    self._drafts[kind].increment(more)
            self._stats = stats
            for key, value in _values(stats).items():
                if self._values.get(key) != value:
                    self._values[key] = value
                    self._gauge(*key).set(value)
        while not self._lengths.empty():
            for length, (_, histogram) in zip(self._lengths.get(), self._histograms, strict=True):
                histogram.observe(length)

    def close(self) -> None:
        """Give all of it back to the server, metrics before their families; nothing may be called afterwards.

        What is left to the end of the process is destroyed after its way to the server is gone, which was a crash
        (triton-inference-server/server#8662).
        """
        self._children.clear()
        self._nothing.clear()
        self._histograms.clear()
        self._drafts.clear()
        self._gauges.clear()
        del self._disaggregated, self._drafts_family

    def _gauge(self, family: str, kind: str) -> Any:
        if (family, kind) not in self._children:
            label = _GAUGES[family][0]
            self._children[family, kind] = self._gauges[family].Metric(labels=self._labels | {label: kind})
        return self._children[family, kind]


def _drafts(stats: Stats) -> dict[str, int]:
    return {"drafted": stats.draft_tokens, "accepted": stats.accepted_draft_tokens}


def _values(stats: Stats) -> dict[tuple[str, str], float]:
    """Value of each gauge. Nothing is paused, reused blocks are not told by OpenVINO, and there is no GPU."""
    families: dict[str, dict[str, float]] = {
        "nv_trt_llm_request_metrics": {
            "active": stats.active,
            "max": stats.max_requests,
            "scheduled": stats.context + stats.generating,
            "context": stats.context,
            "waiting": stats.waiting,
        },
        "nv_trt_llm_runtime_memory_metrics": {"cpu": status_bytes("VmRSS") or 0, "gpu": 0, "pinned": 0},
        "nv_trt_llm_kv_cache_block_metrics": {
            "max": stats.max_blocks,
            "free": stats.max_blocks - stats.used_blocks,
            "used": stats.used_blocks,
            "tokens_per": TOKENS_PER_BLOCK,
            "reused": 0,
            "fraction": stats.used_blocks / stats.max_blocks,
        },
        "nv_trt_llm_inflight_batcher_metrics": {
            "total_context_tokens": stats.context_tokens,
            "generation_requests": stats.generating,
            "micro_batch_id": 0,
            "paused_requests": 0,
        },
        "nv_trt_llm_general_metrics": {"timestamp": time.time_ns() // 1000, "iteration_counter": stats.steps},
    }
    return {(family, kind): value for family, values in families.items() for kind, value in values.items()}
