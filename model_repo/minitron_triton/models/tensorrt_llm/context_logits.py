"""The logits of whole prompts: the engine's model once more, as a plain one, beside the pipeline.

OpenVINO GenAI's pipeline gives no logits. Its ``echo`` gives the log probs of a prompt's own tokens and of no others,
and leaves out those that its prefix cache held, which no request can go around. So what TensorRT-LLM calls context
logits is computed here, from the same file in the same arithmetic, one prompt at a time, with nothing reused.

The model is loaded when it is first asked for. It shares the pages of the file with the pipeline, and has its own copy
of the packed weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

#: Tokens of one step, between which a request may end.
STEP_TOKENS = 128


class ContextLogits:
    """Prompts in their order, in a thread of its own: ``infer`` lets Python's lock go, and the pipeline steps on."""

    def __init__(self, open_model: Callable[[], Any], vocab_size: int) -> None:
        """``open_model`` gives what has ``reset_state()`` and ``infer(ids, start)``, the logits [n, vocabulary]."""
        self._open, self._vocab_size = open_model, vocab_size
        self._model: Any = None
        self._thread = ThreadPoolExecutor(1, "context-logits")
        self._closing = threading.Event()

    def submit(
        self, prompt: Sequence[int], is_wanted: Callable[[], bool], done: Callable[[Logits | Exception | None], None]
    ) -> None:
        """Compute the logits [prompt, vocabulary] float32, row i what the model expects behind token i.

        ``done`` is called with them from the thread, or with what OpenVINO raised, or with None once nobody wants them.
        """
        self._thread.submit(lambda: done(self._result(np.asarray(prompt, np.int64), is_wanted)))

    def close(self) -> None:
        """Compute nothing more, and let go of the model."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._model = None

    def _result(self, prompt: NDArray[np.int64], is_wanted: Callable[[], bool]) -> Logits | Exception | None:
        try:
            return self._computed(prompt, is_wanted)
        except Exception as error:
            self._model = None  # opened anew for the next
            return error

    def _computed(self, prompt: NDArray[np.int64], is_wanted: Callable[[], bool]) -> Logits | None:
        if not is_wanted():
            return None
        self._model = self._model or self._open()
        self._model.reset_state()
        logits = np.empty((len(prompt), self._vocab_size), np.float32)
        for start in range(0, len(prompt), STEP_TOKENS):
            if self._closing.is_set() or not is_wanted():
                return None
            ids = prompt[start : start + STEP_TOKENS]
            logits[start : start + len(ids)] = self._model.infer(ids, start)
        return logits
