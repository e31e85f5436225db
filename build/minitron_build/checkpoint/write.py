"""Write a rank's file in one pass: blocks are computed by several threads and written and hashed in file order.

Memory is bounded by the blocks in flight, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_build.checkpoint.plan import PlannedTensor, Rule
from minitron_build.checkpoint.values import Array, Calculator, Values

_BLOCK_ELEMENTS = 1 << 19
_BLOCK_ROWS = 64
"""Blocks have a multiple of this many rows: whole tiles of the layout of codes."""

_BLOCKS_AHEAD = 16

#: Called after each block with its bytes, the tensor's name, and 1 where that was the tensor's last block, else 0.
Progress = Callable[[int, str, int], None]


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` of a planned tensor, computed by one thread in one go."""

    planned: PlannedTensor
    start: int
    stop: int


def header(planned: Sequence[PlannedTensor]) -> bytes:
    """The safetensors header of a file with these tensors, padded so that the tensors begin at a multiple of 8."""
    entries, position = {}, 0
    for tensor in planned:
        offsets = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def blocks(planned: PlannedTensor) -> Iterator[Block]:
    """Cut a tensor into blocks of about _BLOCK_ELEMENTS."""
    step = max(_BLOCK_ELEMENTS // planned.columns // _BLOCK_ROWS, 1) * _BLOCK_ROWS
    for start in range(0, planned.rows, step):
        yield Block(planned, start, min(start + step, planned.rows))


def write_rank(
    path: Path, planned: Sequence[PlannedTensor], calculator: Calculator, pool: ThreadPoolExecutor, progress: Progress
) -> str:
    """Write the planned tensors to ``path`` and return the SHA-256 of the file; raises ModelError, OSError."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def emit(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[file.write(data) :]

        emit(memoryview(header(planned)))
        for block, values in _computed(planned, calculator, pool):
            emit(_bytes(values.data))
            progress(values.data.nbytes, block.planned.name, int(block.stop == block.planned.rows))
    return digest.hexdigest()


def _computed(
    planned: Sequence[PlannedTensor], calculator: Calculator, pool: ThreadPoolExecutor
) -> Iterator[tuple[Block, Values]]:
    """Blocks with their values, in file order; scales follow from the codes before them."""
    scales: list[Array] = []
    for block, values in _ahead(planned, calculator, pool):
        if values is None:
            yield block, Values(np.concatenate(scales))
            scales.clear()
        else:
            if values.scales is not None:
                scales.append(values.scales)
            yield block, values


def _ahead(
    planned: Sequence[PlannedTensor], calculator: Calculator, pool: ThreadPoolExecutor
) -> Iterator[tuple[Block, Values | None]]:
    """Compute a few blocks ahead of the one that is being written; None in place of scales."""
    waiting: deque[tuple[Block, Future[Values] | None]] = deque()
    for tensor in planned:
        if tensor.rule is Rule.SCALES:
            waiting.append((Block(tensor, 0, tensor.rows), None))
            continue
        for block in blocks(tensor):
            waiting.append((block, pool.submit(calculator.values, tensor, block.start, block.stop)))
            while len(waiting) > _BLOCKS_AHEAD:
                yield _result(*waiting.popleft())
    while waiting:
        yield _result(*waiting.popleft())


def _result(block: Block, future: Future[Values] | None) -> tuple[Block, Values | None]:
    return block, future.result() if future is not None else None


def _bytes(array: Array) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
