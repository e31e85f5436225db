"""Run a CPU engine on texts that begin alike: what they share is computed once, and they go on side by side.

The engine keeps keys and values of one batch. ``beam_idx`` names, for each sequence of a step, the one of the step
before that it goes on from: naming the first for all makes several of one. ``attention_mask`` hides columns: those that
fill up shorter texts (on the left, so that all end in one column), and those of texts that were left. Positions are
given for each token, so that hidden columns change no result but in the last bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.machine import cpu_execution, cpu_head
from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import process_core
from minitron_build.engines.openvino.ir import XML
from minitron_build.engines.openvino.nodes import ints, parameter
from minitron_build.engines.openvino.write import MODEL_FOLDER

Ids = Sequence[int]
Logits = npt.NDArray[np.float32]

_ROWS = "rows"
#: Elements of the logits of one step (268 MB), and tokens of one.
_MOST_LOGITS, _MOST_TOKENS = 1 << 26, 512
#: Hidden columns at which the prefix is computed anew: attention looks at them in vain.
_MOST_HIDDEN = 1024


class PrefixEngine:
    """An engine folder's model, with its whole head: texts that go on from one prefix.

    ``vocab_size`` is that of its logits. Not to be used from several threads.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.vocab_size = int(config["pretrained_config"]["vocab_size"])
        core = process_core()
        model = cpu_head.without_screen(core.read_model(str(folder / MODEL_FOLDER / XML)))
        _choose_rows(model)
        self._request: Any = core.compile_model(model, "CPU", cpu_execution.properties(config)).create_infer_request()
        self._forget()

    def _forget(self) -> None:
        self._request.reset_state()
        self._prefix: list[int] = []
        self._columns: list[int] = []  # of the prefix's tokens
        self._seen = np.zeros((1, 0), np.int64)  # of each sequence's columns: 1 where it may look

    def start(self, prefix: Ids) -> None:
        """Let the next texts begin with ``prefix``, which may be empty; what the last prefix shares with it is kept."""
        shared = common_length([self._prefix, prefix])
        hidden = self._seen.shape[1] - shared
        if hidden > _MOST_HIDDEN or not shared:
            self._forget()
            shared = 0
        self._prefix, self._columns = self._prefix[:shared], self._columns[:shared]
        self._seen = np.zeros((1, self._seen.shape[1]), np.int64)
        self._seen[0, self._columns] = 1
        for begin in range(shared, len(prefix), _MOST_TOKENS):
            some = list(prefix[begin : begin + _MOST_TOKENS])
            first = self._seen.shape[1]
            self._step([some], np.arange(begin, begin + len(some))[None], np.ones((1, len(some)), np.int64),
                       beams=[0], rows=[len(some) - 1])  # fmt: skip
            self._prefix += some
            self._columns += range(first, first + len(some))

    def go_on(self, texts: Sequence[Ids], wanted: int) -> Iterator[tuple[int, Logits]]:
        """Go on from the prefix with each of ``texts``, none of them empty, and give what follows their last tokens.

        Yields (how many tokens before the end the first row stands, logits [text, row, vocabulary]), until ``wanted``
        rows were given, the last of them behind the last tokens. A text shorter than that has rows of no meaning.
        The next step of a text is ``step``; ``start`` leaves them.
        """
        width, count = max(map(len, texts)), len(texts)
        real = np.array([[0] * (width - len(text)) + [1] * len(text) for text in texts], np.int64)
        tokens = np.array([[0] * (width - len(text)) + list(text) for text in texts], np.int64)
        positions = np.maximum(np.cumsum(real, axis=1) - 1, 0) + len(self._prefix)
        beams = [0] * count
        most = max(min(_MOST_LOGITS // self.vocab_size, _MOST_TOKENS) // count, 1)
        for begin in range(0, width, most):
            end = min(begin + most, width)
            first = max(width - wanted, begin)
            part = slice(begin, end)
            rows = range(first - begin, end - begin) if first < end else [end - begin - 1]
            logits = self._step(tokens[:, part], positions[:, part], real[:, part], beams, rows)
            beams = list(range(count))
            if first < end:
                yield width - first, logits
        self._next = positions[:, -1] + 1

    def step(self, tokens: Ids, beams: Sequence[int]) -> Logits:
        """One more token for each text that goes on: ``beams`` of those of the step before.

        Logits [text, vocabulary].
        """
        positions = self._next[list(beams)]
        logits = self._step([[token] for token in tokens], positions[:, None], np.ones((len(tokens), 1), np.int64),
                            beams, rows=[0])  # fmt: skip
        self._next = positions + 1
        row: Logits = logits[:, 0]
        return row

    def _step(self, tokens: Any, positions: Any, real: Any, beams: Sequence[int], rows: Sequence[int]) -> Logits:
        self._seen = np.concatenate([self._seen[list(beams)], real], axis=1)
        logits: Logits = self._request.infer({
            "input_ids": np.asarray(tokens, np.int64),
            "attention_mask": self._seen,
            "position_ids": np.asarray(positions, np.int64),
            "beam_idx": np.asarray(beams, np.int32),
            _ROWS: np.asarray(rows, np.int64),
        })["logits"]  # fmt: skip
        return logits


def common_length(texts: Sequence[Ids]) -> int:
    """How many ids the texts have in common from their first on."""
    shortest = min(map(len, texts))
    first = texts[0]
    return next((i for i in range(shortest) if any(text[i] != first[i] for text in texts)), shortest)


def _choose_rows(model: Any) -> None:
    """Give ``model`` the input ``rows``, int64 [n]: logits are computed of these tokens of a step alone."""
    head = model.output("logits").get_node().input_value(0).get_node()
    rows = parameter(_ROWS, 1)
    chosen = op.gather(head.input_value(0), rows, ints(1))
    head.input(0).replace_source_output(chosen.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
