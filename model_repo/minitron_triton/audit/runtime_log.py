"""What TensorRT-LLM's runtime prints while it loads an engine, read from the server's log.

Wordings: TensorRT-LLM 0.15 to 1.1 as people posted them (NVIDIA/TensorRT-LLM pull request 4028, issues 2398 and 2449,
triton-inference-server/tutorials pull request 150); none of it was seen by this project itself. Sizes are printed in
powers of 1024 whatever the unit's name (MB stands for MiB).

What begins a line, cpp/include/tensorrt_llm/common/logger.h: ``[TensorRT-LLM][WARNING] `` or, with a rank,
``[TensorRT-LLM][WARNING][0] `` (NVIDIA/TensorRT-LLM 4f91d4ab); ``TIMESTAMP [TRT-LLM] [W] `` or ``... [W] [0] ``
(00f83d1b); the package's Python logger writes ``[TIMESTAMP] [TRT-LLM] [W] ``, with ``[RANK 0]`` before the level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = {"B": 1, "KB": 1 << 10, "KiB": 1 << 10, "MB": 1 << 20, "MiB": 1 << 20, "GB": 1 << 30, "GiB": 1 << 30}
_SIZE = r"(?P<size>[\d.]+) (?P<unit>[KMG]?i?B)"
_ENGINE = re.compile(rf"Loaded engine size: {_SIZE}")
_WORKSPACE = {
    "execution context": re.compile(rf"Allocated {_SIZE} for execution context memory"),
    "runtime buffers": re.compile(rf"Allocated {_SIZE} GPU memory for runtime buffers"),
    "decoder": re.compile(rf"Allocated {_SIZE} GPU memory for decoder"),
}
_KV_CACHE = re.compile(rf"Allocated {_SIZE} for max tokens in paged KV cache \((?P<tokens>\d+)\)")
_LIMIT = re.compile(
    r"TRTGptModel (?P<name>maxBatchSize|maxBeamWidth|maxSequenceLen|maxNumTokens|maxInputLen|normalizeLogProbs)"
    r": (?P<value>\d+)"
)
_POLICY = re.compile(r"Capacity Scheduler Policy: (?P<value>\w+)")
_WARNING = r"(?:\[TensorRT-LLM\]\[WARNING\]|\[TRT-LLM\] (?:\[RANK \d+\] )?\[W\])(?: ?\[\d+\])?"
_NOT_READ = re.compile(
    _WARNING + r" (?P<text>(?P<key>[a-z][a-z0-9_]*)\b.*(?:not specified|not found|not set|invalid).*)"
)


@dataclass(frozen=True)
class RuntimeLog:
    """What was found; None or empty where the log does not say. With several ranks, the largest of each size.

    ``limits``: what the runtime calls its limits, such as maxBatchSize. ``not_read``: parameter → the warning about it.
    """

    engine_bytes: int | None
    workspace_bytes: dict[str, int]
    kv_cache_bytes: int | None
    kv_cache_tokens: int | None
    limits: dict[str, int]
    scheduler_policy: str | None
    not_read: dict[str, str]

    @classmethod
    def parse(cls, lines: Iterable[str]) -> RuntimeLog:
        """Read a log."""
        engine: list[int] = []
        workspace: dict[str, list[int]] = {}
        cache: list[tuple[int, int]] = []
        limits: dict[str, int] = {}
        policy, not_read = None, {}
        for line in lines:
            if match := _ENGINE.search(line):
                engine.append(_bytes(match))
            elif match := _KV_CACHE.search(line):
                cache.append((int(match["tokens"]), _bytes(match)))
            elif match := _LIMIT.search(line):
                limits[match["name"]] = int(match["value"])
            elif match := _POLICY.search(line):
                policy = match["value"]
            elif match := _NOT_READ.search(line):
                not_read[match["key"]] = match["text"].strip()
            for name, pattern in _WORKSPACE.items():
                if match := pattern.search(line):
                    workspace.setdefault(name, []).append(_bytes(match))
        tokens, size = min(cache) if cache else (None, None)  # the fullest rank decides
        return cls(max(engine, default=None), {name: max(sizes) for name, sizes in workspace.items()}, size, tokens,
                   limits, policy, not_read)  # fmt: skip


def _bytes(match: re.Match[str]) -> int:
    return int(float(match["size"]) * _UNITS[match["unit"]])
