"""Triton model ``preprocessing``: texts to the inputs of tensorrt_llm, for the ensemble."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # what lies beside this file comes before what is installed

from triton_config import flag, one_line, parameters

from minitron.text import packages
from minitron.text.errors import RequestError
from minitron.text.prompts import PromptMaker
from minitron.text.tokenizer import TextTokenizer


class TritonPythonModel:
    """One response per request; a wrong request gets an error of one line."""

    def initialize(self, args: dict[str, str]) -> None:
        """Take the parameters in; fails the load where a package is missing that the first request would need."""
        packages.check(packages.TOKENIZING)
        self._values = parameters(args)

    @functools.cached_property
    def _prompts(self) -> PromptMaker:
        """With the tokenizer, which is loaded for the first request: many servers never have one for the ensemble.

        A tokenizer of 256,000 words takes 0.9 s of a core and 100 MB, while the engine packs its weights. The text
        model loads the same folder at once, and a server whose tokenizer is broken does not start.
        """
        add_special_tokens = flag(self._values.get("add_special_tokens", "true"))
        tokenizer = TextTokenizer(self._values["tokenizer_dir"], add_special_tokens=add_special_tokens)
        return PromptMaker(tokenizer, self._values)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch of requests in their order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(self._outputs(request))
        except RequestError as error:
            return _refusal(one_line(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(f"preprocessing: {error!r}")
            return _refusal(f"preprocessing failed ({type(error).__name__})", pb_utils.TritonError.INTERNAL)

    def _outputs(self, request: Any) -> list[Any]:
        def given(name: str) -> Any:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        prompt = self._prompts.make(
            given("QUERY"),
            given("REQUEST_OUTPUT_LEN"),
            stop_words=given("STOP_WORDS_DICT"),
            bad_words=given("BAD_WORDS_DICT"),
            bias_words=given("EMBEDDING_BIAS_WORDS"),
            bias_weights=given("EMBEDDING_BIAS_WEIGHTS"),
            end_id=given("END_ID"),
            pad_id=given("PAD_ID"),
        )
        outputs = {
            "INPUT_ID": prompt.input_ids,
            "REQUEST_INPUT_LEN": prompt.input_lengths,
            "REQUEST_OUTPUT_LEN": prompt.request_output_len,
            "STOP_WORDS_IDS": prompt.stop_words_list,
            "BAD_WORDS_IDS": prompt.bad_words_list,
            "EMBEDDING_BIAS": prompt.embedding_bias,
            "OUT_END_ID": prompt.end_id,
            "OUT_PAD_ID": prompt.pad_id,
        }
        return [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in outputs.items()]


def _refusal(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
