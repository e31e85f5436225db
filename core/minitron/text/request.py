"""A client's request for text, as arrays, and what it means for tensorrt_llm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.text.errors import RequestError
from minitron.text.prompts import Prompt, string_rows
from minitron.text.tensors import Arrays, Tensors

#: Inputs that go on to tensorrt_llm as they are: name here, name there.
_PASSED_ON = {
    "num_return_sequences": "num_return_sequences",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "temperature": "temperature",
    "length_penalty": "len_penalty",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "return_log_probs": "return_log_probs",
    "return_context_logits": "return_context_logits",
    "return_generation_logits": "return_generation_logits",
    "return_perf_metrics": "return_perf_metrics",
    "return_num_input_tokens": "return_num_input_tokens",
    "return_num_output_tokens": "return_num_output_tokens",
    "beam_width": "beam_width",
}


@dataclass(frozen=True)
class TextRequest:
    """``arrays`` by the names of the text model's inputs, each [batch, …]; ``stop_words`` for each prompt of the batch.

    ``streams``: the client wants the text as it comes. ``echoes``: it wants the prompt before a whole answer.
    """

    arrays: Arrays
    batch: int
    streams: bool
    echoes: bool
    sequences: int
    stop_words: list[list[str]]

    @classmethod
    def read(cls, arrays: Arrays, *, excludes_input: bool) -> TextRequest:
        """Look at the inputs that the text itself depends on; raises RequestError."""
        batch = arrays["text_input"].size
        streams = bool(_first(arrays, "stream", False))
        if streams and int(_first(arrays, "beam_width", 1)) > 1:
            raise RequestError("beams change until the last token: a beam_width above 1 cannot be streamed")
        stop_words = arrays.get("stop_words")
        return cls(
            arrays, batch, streams,
            echoes=not streams and not bool(_first(arrays, "exclude_input_in_output", excludes_input)),
            sequences=max(1, int(_first(arrays, "num_return_sequences", 1))),
            stop_words=[[]] * batch if stop_words is None else string_rows(stop_words, batch, "stop_words"),
        )  # fmt: skip

    def tokens_with_logits(self, prompt: Prompt) -> int:
        """Of how many tokens, all sequences and beams together, logits are asked for; each side only where it is."""
        copies = self.sequences * int(_first(self.arrays, "beam_width", 1))
        asked = (("return_context_logits", prompt.input_lengths, 1),
                 ("return_generation_logits", prompt.request_output_len, copies))  # fmt: skip
        return sum(int(lengths.sum()) * times for name, lengths, times in asked if _first(self.arrays, name, False))

    def engine_inputs(self, prompt: Prompt) -> Tensors:
        """The inputs of tensorrt_llm.

        The engine streams for a whole answer too when there are stop strings, so that it can be stopped at one. It
        never returns the prompt: its text is known here already.
        """
        beams = int(_first(self.arrays, "beam_width", 1))
        streams = self.streams or (any(self.stop_words) and beams == 1)
        inputs: Tensors = {
            "input_ids": prompt.input_ids,
            "input_lengths": prompt.input_lengths,
            "request_output_len": prompt.request_output_len,
            "pad_id": prompt.pad_id,
            "streaming": np.full((self.batch, 1), streams),
            "exclude_input_in_output": np.full((self.batch, 1), True),
        }
        if (prompt.end_id >= 0).all():
            inputs["end_id"] = prompt.end_id
        for name in ("stop_words_list", "bad_words_list", "embedding_bias"):
            value = getattr(prompt, name)
            if value.size:
                inputs[name] = value
        for ours, theirs in _PASSED_ON.items():
            if ours in self.arrays:
                inputs[theirs] = self.arrays[ours].reshape(self.batch, 1)
        return inputs


def _first(arrays: Arrays, name: str, default: Any) -> Any:
    return arrays[name].reshape(-1)[0] if name in arrays else default
