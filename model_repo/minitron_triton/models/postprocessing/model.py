"""Triton model ``postprocessing``: output ids to texts, for the ensemble.

It keeps no state: each response is decoded by itself. Whole answers are exact; of a stream, the space before a word
and characters spread over several tokens get lost. tensorrt_llm_bls has neither limit.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # what lies beside this file comes before what is installed

from triton_config import flag, parameters

from minitron.text import packages
from minitron.text.tokenizer import TextTokenizer


class TritonPythonModel:
    """``OUTPUT`` is [rows], rank 1 as upstream's, one text for each sequence and beam."""

    def initialize(self, args: dict[str, str]) -> None:
        """Take the parameters in; fails the load where a package is missing that the first request would need."""
        packages.check(packages.TOKENIZING)
        self._values = parameters(args)

    @functools.cached_property
    def _tokenizer(self) -> TextTokenizer:
        """Loaded for the first request, as that of preprocessing is."""
        skip_special_tokens = flag(self._values.get("skip_special_tokens", "true"))
        return TextTokenizer(self._values["tokenizer_dir"], skip_special_tokens=skip_special_tokens)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch of requests in their order."""
        return [self._answer(request) for request in requests]

    def _text(self, ids: list[int]) -> str:
        """The engine leaves out the end token that a request names; the model's other ones are stop words to it."""
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._tokenizer.end_ids else ids)

    def _answer(self, request: Any) -> Any:
        try:
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy().reshape(-1)
            rows = tokens.reshape(len(lengths), -1)
            texts = [self._text(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]
            output = np.array([text.encode() for text in texts], dtype=object)
            return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)])
        except Exception as error:
            pb_utils.Logger.log_error(f"postprocessing: {error!r}")
            message = f"postprocessing failed ({type(error).__name__})"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
