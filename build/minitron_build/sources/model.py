"""The seam between a model and whoever converts it: a shape, the tokenizer's files, and named tensors.

A source speaks of tensors by their Hugging Face names (transformers' NemotronForCausalLM), whatever its own files call
them. Converting never learns which kind of file it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minitron.errors import ModelError
from minitron.model.shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_NAMED_AT_ONCE = 3
"""How many missing or extra names an error message lists."""

_DECIDED_BY: dict[str, Callable[[str], bool]] = {
    "tie_word_embeddings": (HEAD, EMBEDDING).__contains__,
    "num_hidden_layers": lambda name: name.startswith("model.layers."),
}
"""The key that says how many of these tensors there are."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that is still on the disk, in ``file``: ``read(start, stop)`` gives those rows (first axis) as stored.

    ``dtype`` is float32, float16 or ml_dtypes.bfloat16. ``read`` may be called from several threads.
    """

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[int, int], npt.NDArray[Any]]


@dataclass(frozen=True)
class Provenance:
    """What had happened to the weights before, as far as the source tells.

    ``stored_types`` names the type of each tensor in a file that may be quantised (Q4_K, F32, ...); ``losses`` are
    sentences for people. Both are empty for weights as they were trained. ``remarks`` are sentences too: what of the
    source was not read, and why.
    """

    stored_types: dict[str, str] = field(default_factory=dict)
    losses: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Source(Protocol):
    """A model to convert. ``kind``, ``path`` and ``revision`` say in the manifest where it came from."""

    kind: str
    path: str
    revision: str | None

    def shape(self) -> ModelShape:
        """Sizes and constants; raises ModelError."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """Content of the tokenizer's files by name, none if there is no tokenizer; always generation_config.json."""
        ...

    def generation_config(self) -> bytes:
        """generation_config.json, made from the ids that the model names where it has none."""
        ...

    def tensors(self) -> dict[str, SourceTensor]:
        """All tensors of the model, checked against its shape, in a fixed order; raises ModelError."""
        ...

    def provenance(self) -> Provenance:
        """What had happened to the weights before."""
        ...

    def files(self) -> dict[str, Path]:
        """The files that are read, by the name that the manifest gives them."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def expected(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a NemotronForCausalLM: linear weights (out, in), norms with a bias."""
    sizes = _sizes(shape)
    return ((name, tuple(sizes[key] for key in keys)) for name, keys in _named_sizes(shape.num_layers))


def _sizes(shape: ModelShape) -> dict[str, int]:
    """What the keys of config.json that an axis is named after come to."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_key_value_heads x hidden_size / num_attention_heads": shape.num_kv_heads * shape.head_size,
    }


def _named_sizes(layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    hidden, inner, vocab, kv = (
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_key_value_heads x hidden_size / num_attention_heads",
    )
    yield EMBEDDING, (vocab, hidden)
    for index in range(layers):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
            yield f"{layer}.{norm}.bias", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "model.norm.bias", (hidden,)
    yield HEAD, (vocab, hidden)


def complete(found: Mapping[str, SourceTensor], shape: ModelShape, where: str) -> dict[str, SourceTensor]:
    """The model's tensors in the order of ``expected``; raises ModelError.

    Of a tied head and embedding either may be missing, as in transformers. Missing and extra tensors, other shapes, and
    other types than float32, float16 and bfloat16 are refused.
    """
    if shape.num_layers > len(found):  # also keeps an absurd number from being enumerated
        layers = f"config.json says {shape.num_layers} layers"
        raise ModelError(f"{where}: {layers}, and there are {len(found)} tensors; correct num_hidden_layers")
    found = dict(found)
    if shape.tied_embeddings:
        for name, twin in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if name not in found and twin in found:
                found[name] = found[twin]
    wanted = dict(expected(shape))
    _refuse_names([name for name in wanted if name not in found], "lacks", "get the missing files", where)
    _refuse_names([name for name in found if name not in wanted], "has, unknown to a Nemotron,",
                  "is it another model, or one with adapters not merged?", where)  # fmt: skip
    keys, sizes = dict(_named_sizes(shape.num_layers)), _sizes(shape)
    for name, asked in wanted.items():
        if found[name].shape != asked:
            axes = zip(keys[name], found[name].shape, strict=False)
            wrong = ", ".join(f"{key} {sizes[key]}" for key, size in axes if size != sizes[key])
            has = f"{name} has shape {list(found[name].shape)}"
            raise ModelError(
                f"{where}: {has}, config.json asks for {list(asked)} ({wrong or 'another kind of tensor'})"
            )
    return {name: found[name] for name in wanted}


def _refuse_names(names: list[str], verb: str, advice: str, where: str) -> None:
    if names:
        more = f" and {len(names) - _NAMED_AT_ONCE} more" if len(names) > _NAMED_AT_ONCE else ""
        keys = [key for key, has in _DECIDED_BY.items() if all(has(name) for name in names)]
        decided = f" (config.json's {keys[0]} decides)" if keys else ""
        raise ModelError(f"{where} {verb} tensor {', '.join(names[:_NAMED_AT_ONCE])}{more}{decided}; {advice}")
