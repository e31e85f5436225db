"""Run a CPU engine as a plain stateful OpenVINO model: all log-probabilities of a text, not only the last ones.

And what they came through: the largest magnitudes of each layer's activations.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.machine import cpu_execution, cpu_head
from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import process_core
from minitron.model.activations import KINDS
from minitron_build.engines.openvino.graph import measured_node
from minitron_build.engines.openvino.ir import XML
from minitron_build.engines.openvino.nodes import ints
from minitron_build.engines.openvino.write import MODEL_FOLDER
from minitron_build.evaluate.measures import Peaks, Rows, log_probabilities

#: Tokens of one step: it bounds the memory that logits take (131 MB at a vocabulary of 256,000).
STEP_TOKENS = 128

#: The same where a screen looks for the words that get true logits: it takes fewer of them the more rows there are.
_SCREENED_STEP_TOKENS = 32

_PEAKS = "largest"


class RunningEngine:
    """An engine folder's model, loaded with the settings and the head that it is served with."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        core = process_core()
        model = core.read_model(str(folder / MODEL_FOLDER / XML))
        self._screened = any(node.get_friendly_name() == cpu_head.ROWS for node in model.get_parameters())
        self._measures = _measure(model)
        compiled = core.compile_model(model, "CPU", cpu_execution.properties(config))
        self._request: Any = compiled.create_infer_request()

    def largest(self) -> Peaks:
        """Of the last step: each layer's largest magnitudes by kind; empty for an engine of an older build."""
        if not self._measures:
            return {}
        found = self._request.get_tensor(_PEAKS).data
        return {kind: [float(value) for value in values] for kind, values in zip(KINDS, found, strict=True)}

    def predictions(self, window: npt.NDArray[np.int64]) -> Iterator[tuple[Rows, npt.NDArray[np.int64]]]:
        """Log-probabilities [n, vocab] and the ids [n] that follow, step by step, for all tokens but the first."""
        self._request.reset_state()
        seen = window[:-1]
        step = _SCREENED_STEP_TOKENS if self._screened else STEP_TOKENS
        for start in range(0, len(seen), step):
            stop = min(start + step, len(seen))
            inputs = {
                "input_ids": seen[None, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            if self._screened:
                inputs[cpu_head.ROWS] = np.arange(stop - start, dtype=np.int64)
            logits = self._request.infer(inputs)["logits"].reshape(stop - start, -1)
            yield log_probabilities(logits), window[start + 1 : stop + 1]


def _measure(model: Any) -> bool:
    """Give ``model`` the output ``largest``, float32 [kind, layer]; False where its nodes do not have their names."""
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    layers = next(layer for layer in itertools.count() if measured_node(layer, "fc") not in nodes)
    if not layers:
        return False

    def largest(*kinds: str) -> Any:
        return op.concat(
            [_largest([nodes[measured_node(layer, kind)] for kind in kinds]) for layer in range(layers)], 0
        )

    rows = [op.unsqueeze(row, ints([0])) for row in (largest("fc"), largest("proj"), largest("attended", "residual"))]
    peaks = op.concat(rows, 0)
    peaks.output(0).set_names({_PEAKS})
    model.add_results([op.result(peaks)])
    return True


def _largest(nodes: list[Any]) -> Any:
    """The largest magnitude of [1, tokens, size] nodes, [1]; what is no number counts as infinite, for the plugin's
    maximum would pass it over.
    """
    infinite, sizes = op.constant(np.float32(np.inf)), [op.abs(node) for node in nodes]
    numbers = [op.select(op.less(size, infinite), size, infinite) for size in sizes]
    each = [op.reduce_max(size, ints([0, 1, 2]), False) for size in numbers]
    return op.unsqueeze(functools.reduce(op.maximum, each), ints([0]))
