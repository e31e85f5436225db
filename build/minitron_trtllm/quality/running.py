"""Run a CPU engine as a plain stateful OpenVINO model: all log-probabilities of a text, not only the last ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_trtllm import cpu_execution
from minitron_trtllm.engine.openvino import MODEL_FOLDER
from minitron_trtllm.engine.openvino_import import ov
from minitron_trtllm.engine.openvino_ir import XML
from minitron_trtllm.quality.measures import Rows, log_probabilities

#: Tokens of one step: it bounds the memory that logits take (131 MB at a vocabulary of 256,000).
STEP_TOKENS = 128


class RunningEngine:
    """An engine folder's model, loaded with the settings that it is served with."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        core = ov.Core()
        compiled = core.compile_model(str(folder / MODEL_FOLDER / XML), "CPU", cpu_execution.properties(config))
        self._request: Any = compiled.create_infer_request()

    def predictions(self, window: npt.NDArray[np.int64]) -> Iterator[tuple[Rows, npt.NDArray[np.int64]]]:
        """Log-probabilities [n, vocab] and the ids [n] that follow, step by step, for all tokens but the first."""
        self._request.reset_state()
        seen = window[:-1]
        for start in range(0, len(seen), STEP_TOKENS):
            stop = min(start + STEP_TOKENS, len(seen))
            inputs = {
                "input_ids": seen[None, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = self._request.infer(inputs)["logits"][0]
            yield log_probabilities(logits), window[start + 1 : stop + 1]
