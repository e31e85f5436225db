"""What a CPU server takes of the machine's memory: the one place that says it, in bytes.

What is counted is ``minitron serve`` and every process below it, each page once (proc(5), smaps_rollup: Pss). Its
**private** memory (anonymous pages) has to fit. The **peak** is the most that there is at one moment while it loads,
private memory and the mapped pages of files together, or private memory later on, with a full KV cache, where that is
more. Pages of the weights' file that later steps read, rows of the embedding and of the 16-bit head behind a screen,
are not counted: the kernel drops them when it wants to.

Of the weights, the CPU plugin keeps a packed copy of what a step multiplies with, as large as in the file: 8 bits for
int8, 4 for int4, 16 for 16-bit weights, in exact mode and in fast mode. While it packs, the file's pages are resident
too, and are given back at its end. All else here was measured with OpenVINO 2026.4.1 and Triton 2.51 on AVX2
(``benches/bench_memory.py``; docs/cpu-engine.md has both beside each other, and what AVX-512 took).

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.machine.cpu_execution import kv_element_bytes_of
from minitron.model.runtime_limits import TOKENS_PER_BLOCK, whole_blocks

#: Words of a screened head that a row of a step looks at in 16 bits, at the least; a model that hardly tells its words
#: apart has more of them (``minitron_build.engines.openvino.head``).
_CANDIDATES = 256
#: The engine's process before its weights: Python, OpenVINO, the graph, and of that what each layer adds.
_ENGINE_BYTES, _LAYER_BYTES = 52_000_000, 1_300_000
#: A Python model with a tokenizer, and of that what each byte of tokenizer.json becomes: 14 (no merges) to 19.
_TEXT_BYTES, _TOKENIZER_FACTOR = 20_000_000, 16
#: tokenizer.json in bytes for a word of the vocabulary, where there is no file yet (a BPE of 256,000 words).
_TOKENIZER_BYTES_PER_WORD = 40
#: ``minitron serve``, tritonserver, and what the text model has beside a tokenizer; the gateway of ``--openai``.
_SERVER_BYTES, _GATEWAY_BYTES = 46_000_000, 25_000_000
#: Mapped pages of programs and libraries; others that run the same ones share them.
_LIBRARY_BYTES = 100_000_000
#: Part of the 16-bit head behind a screen whose pages are mapped by the first steps: they look at single rows, but the
#: kernel maps what lies around a row with it (0.38 to 0.53).
_LOOKED_AT = 0.45
#: A step's buffers are so many times what one layer computes of its tokens; of logits there are two.
_BUFFERS, _LOGITS = 1.7, 2
_FLOAT32 = 4
_FREE_MEMORY_SHARE = 0.5
_WEIGHTS_FILE = Path("openvino") / "openvino_model.bin"


@dataclass(frozen=True)
class Sizes:
    """Of a CPU engine, what decides its memory; ``weight_bytes`` are what a step multiplies with, head included."""

    weight_bytes: int
    layers: int
    vocab_size: int
    hidden_size: int
    computed_per_token: int
    """Elements that one layer computes of a token (``computed_per_token``)."""
    kv_bytes_per_token: float
    screened: bool
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int

    @property
    def step_bytes(self) -> int:
        """Buffers of the largest step: its tokens, the logits of a full batch, and a screened head's rows for them."""
        rows = min(_CANDIDATES, self.vocab_size) * self.hidden_size if self.screened else 0
        logits = self.max_batch_size * (_LOGITS * self.vocab_size + rows)
        return int(_FLOAT32 * (_BUFFERS * self.max_num_tokens * self.computed_per_token + logits))

    @property
    def looked_at_bytes(self) -> int:
        """The 16-bit head behind a screen, as far as the first steps map it."""
        return int(_LOOKED_AT * 2 * self.vocab_size * self.hidden_size) if self.screened else 0

    @property
    def engine_bytes(self) -> int:
        """Private memory of the engine's process without its KV cache."""
        return self.weight_bytes + self.step_bytes + _ENGINE_BYTES + self.layers * _LAYER_BYTES

    def kv_bytes(self, tokens: int) -> int:
        """The KV cache of so many tokens."""
        return int(tokens * self.kv_bytes_per_token)

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the KV cache that a sequence of the full length takes."""
        return whole_blocks(self.max_seq_len)

    def kv_tokens(self, available: int) -> int:
        """Tokens of KV cache that an engine takes by itself: for a full batch at full length, if memory allows it.

        At most half of what the engine leaves of ``available`` bytes; 0 where that is less than one sequence.
        """
        free = max(0, available - self.engine_bytes)
        fitting = int(free * _FREE_MEMORY_SHARE / self.kv_bytes(TOKENS_PER_BLOCK)) * TOKENS_PER_BLOCK
        return min(self.max_batch_size * self.sequence_tokens, fitting) if fitting >= self.sequence_tokens else 0


@dataclass(frozen=True)
class Peak:
    """Bytes by part. ``text``: the models of text and the gateway; ``ensemble``: the tokenizers of preprocessing and
    postprocessing, from their first request on; ``server``: supervisor and Triton; ``looked_at`` is mapped while it
    loads."""

    weights: int
    kv_cache: int
    step: int
    engine: int
    text: int
    ensemble: int
    server: int
    looked_at: int

    @property
    def private(self) -> int:
        """Anonymous memory of all processes, with a full KV cache: what has to fit."""
        return self.weights + self.kv_cache + self.step + self.engine + self.text + self.ensemble + self.server

    @property
    def loading(self) -> int:
        """Private and mapped memory when the last weight is packed, before the first step."""
        return 2 * self.weights + self.looked_at + self.engine + self.text + self.server + _LIBRARY_BYTES

    @property
    def total(self) -> int:
        """The most at one moment."""
        return max(self.loading, self.private)


def peak(
    sizes: Sizes, kv_tokens: int, *, tokenizer_bytes: int | None = None, text_models: int = 3, gateway: bool = False
) -> Peak:
    """What a server of that engine takes at its peak.

    ``tokenizer_bytes``: size of tokenizer.json, None where it is not at hand. ``text_models``: the text model, and each
    instance of preprocessing and postprocessing. ``gateway``: one beside it.
    """
    file_bytes = sizes.vocab_size * _TOKENIZER_BYTES_PER_WORD if tokenizer_bytes is None else tokenizer_bytes
    tokenizer = _TOKENIZER_FACTOR * file_bytes
    texts = text_models * _TEXT_BYTES + tokenizer + gateway * (_TEXT_BYTES + tokenizer + _GATEWAY_BYTES)
    engine = sizes.engine_bytes - sizes.weight_bytes - sizes.step_bytes
    return Peak(
        weights=sizes.weight_bytes,
        kv_cache=sizes.kv_bytes(kv_tokens),
        step=sizes.step_bytes,
        engine=engine,
        text=texts,
        ensemble=(text_models - 1) * tokenizer,
        server=_SERVER_BYTES,
        looked_at=sizes.looked_at_bytes,
    )


def computed_per_token(hidden: int, qkv_rows: int, intermediate: int) -> int:
    """Elements that a layer computes of a token: residual and its norm, q, k and v, attention's output, the MLP."""
    return 3 * hidden + qkv_rows + 2 * intermediate


def read(engine: Path) -> Sizes:
    """The sizes of an engine folder; raises OSError, ValueError, KeyError, TypeError where it is no CPU engine's.

    The rows that are only looked up, the embedding's and those behind a screen, are no weights that are packed.
    """
    config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
    model, limits = config["pretrained_config"], config["build_config"]
    hidden, vocab, head_size = model["hidden_size"], model["vocab_size"], model["head_size"]
    kv_heads, screened = model["num_key_value_heads"], config["cpu"].get("lm_head") == "screened"
    looked_up = 2 * vocab * hidden * (2 if screened else 1)
    return Sizes(
        weight_bytes=max(0, (engine / _WEIGHTS_FILE).stat().st_size - looked_up),
        layers=model["num_hidden_layers"],
        vocab_size=vocab,
        hidden_size=hidden,
        computed_per_token=computed_per_token(
            hidden, (model["num_attention_heads"] + 2 * kv_heads) * head_size, model["intermediate_size"]
        ),
        kv_bytes_per_token=kv_bytes_per_token(config),
        screened=screened,
        max_batch_size=limits["max_batch_size"],
        max_seq_len=limits["max_seq_len"],
        max_num_tokens=limits["max_num_tokens"],
    )


def kv_bytes_per_token(config: Mapping[str, Any]) -> float:
    """Bytes of KV cache for a token, by an engine's config.json; raises KeyError, TypeError where it is no CPU's."""
    model = config["pretrained_config"]
    elements = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_size"]
    return float(elements * kv_element_bytes_of(config))


def tokenizer_bytes(folder: Path) -> int | None:
    """Size of the tokenizer.json of a folder; None where there is none."""
    file = folder / "tokenizer.json"
    return file.stat().st_size if file.is_file() else None
