"""Text over ``tensorrt_llm`` with the tokenizer on this machine: what the text model does, done here by the same code.

A request's tensors by the names of the text model go in, those of its responses come out (``minitron.text``), so
that everything else of the client is as with the text model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import InputError, InvalidRequest
from minitron.model import tokenizer_files
from minitron.text.answers import TextResponses
from minitron.text.errors import RequestError
from minitron.text.prompts import PromptMaker
from minitron.text.request import TextRequest
from minitron.text.tensors import Arrays, Tensors, add_inputs, unpacked
from minitron.text.tokenizer import TextTokenizer

#: The text model's inputs, as its config declares them (TensorRT-LLM 1.2, tensorrt_llm_bls).
INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("text_input", "bad_words", "stop_words", "embedding_bias_words"), "BYTES"),
    **dict.fromkeys(("max_tokens", "min_tokens", "end_id", "pad_id", "top_k", "beam_width", "num_return_sequences"),
                    "INT32"),
    **dict.fromkeys(("top_p", "temperature", "length_penalty", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "embedding_bias_weights"), "FP32"),
    **dict.fromkeys(("return_log_probs", "return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens",
                     "exclude_input_in_output", "stream"), "BOOL"),
    "seed": "UINT64",
}  # fmt: skip
#: Where the server has no text model that tells the engine's limits, the engine itself refuses what is beyond them.
_NO_LIMIT = str(2**31 - 1)


class LocalText:
    """A tokenizer, and the limits of the engine that it serves."""

    def __init__(self, folder: Path, parameters: Mapping[str, str]) -> None:
        """``folder``: the served tokenizer's; ``parameters``: those of the server's text model, where it has one.

        Raises InputError.
        """
        flags = {name: parameters[name] in ("true", "1") for name in _FLAGS if name in parameters}
        try:
            flags.setdefault("add_special_tokens", tokenizer_files.wants_special_tokens(folder))
            self._tokenizer = TextTokenizer(str(folder), **flags)
            size = tokenizer_files.vocabulary_size(folder)
        except (ValueError, OSError) as error:
            raise InputError(f"{folder} holds no tokenizer: {' '.join(str(error).split())[:300]}") from None
        limits = {"max_input_len": _NO_LIMIT, "max_seq_len": _NO_LIMIT, "vocab_size": str(size or 0)}
        self._prompts = PromptMaker(self._tokenizer, {**limits, **parameters})

    def begin(self, message: Any) -> LocalAnswer:
        """Take a request for the text model, which becomes one for tensorrt_llm; raises InvalidRequest."""
        arrays = unpacked(message.inputs, message.raw_input_contents)
        try:
            request = TextRequest.read(arrays, excludes_input=True)
            prompt = self._prompts.of_request(arrays)
        except RequestError as error:
            raise InvalidRequest(f"the request was not sent: {error}") from None
        del message.inputs[:], message.raw_input_contents[:]
        add_inputs(message, request.engine_inputs(prompt))
        return LocalAnswer(TextResponses(self._tokenizer, prompt, request))


_FLAGS = ("add_special_tokens", "skip_special_tokens")


class LocalAnswer:
    """The responses of tensorrt_llm to one request, as those of the text model would be."""

    def __init__(self, answers: TextResponses) -> None:
        self._answers = answers
        self.is_over = False

    def take(self, outputs: Arrays, *, is_final: bool) -> list[Tensors]:
        """What a response gave; behind the last one, and behind the last stop string, what was held back."""
        found = [self._answers.feed(outputs)] if outputs else []
        self.is_over = is_final or self._answers.all_stopped
        return [*(one for one in found if one is not None), *(self._answers.finish() if self.is_over else ())]


def arrays_of(infer: Any) -> Tensors:
    """The tensors of a ``ModelInferResponse``; raises ValueError for bytes that are not what they say."""
    return unpacked(infer.outputs, infer.raw_output_contents)


def as_values(tensors: Tensors) -> tuple[dict[str, list[Any]], dict[str, tuple[int, ...]]]:
    """Flat values, texts as str, and shapes."""
    values = {name: [one.decode() if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()]
              for name, array in tensors.items()}  # fmt: skip
    return values, {name: np.shape(array) for name, array in tensors.items()}
