"""A Nemotron model in a GGUF file, one or split, as llama.cpp's converter and quantiser make it.

What llama.cpp does to a model is undone here: names, and norm weights stored plus one in float32
(``conversion/nemotron.py``). Rows are in Hugging Face's order, queries and keys are not permuted. Metadata keys and
tensor names: github ggml-org/llama.cpp, ``gguf-py/gguf/constants.py`` and ``src/models/nemotron.cpp``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.errors import ModelError
from minitron.model import shape as shapes
from minitron.model import tokenizer_files
from minitron.model.shape import ModelShape
from minitron_build.sources import gguf_tokenizer, model, vocabulary
from minitron_build.sources.gguf_file import GgufEntry, GgufFile, Value
from minitron_build.sources.model import EMBEDDING, HEAD, Provenance, SourceTensor

ARCHITECTURE = "nemotron"
_OUTPUT = "output.weight"
_NAMES = {"token_embd.weight": EMBEDDING, _OUTPUT: HEAD,
          "output_norm.weight": "model.norm.weight", "output_norm.bias": "model.norm.bias"}  # fmt: skip
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
_REQUIRED = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length", "norm_eps": "attention.layer_norm_epsilon",
}  # fmt: skip
_OPTIONAL = {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
_BASE = 10000.0  # llama.cpp's default of rope.freq_base
#: Keys that would change what is computed, with what a Nemotron has built in; the first stands for absence.
_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.sliding_window": (0,), "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "attention.temperature_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "use_parallel_residual": (False,),
    "tensor_data_layout": ("", "reference"), "expert_count": (0,), "expert_used_count": (0,),
    "nextn_predict_layers": (0,), "rope.dimension_sections": (None,), "rope.scaling.attn_factor": (1.0,),
}  # fmt: skip
#: ``general.type`` of what is no model, and other signs of it.
_NO_MODEL = {
    "adapter": "a LoRA adapter; merge it into its model first", "imatrix": "an importance matrix, made for quantising",
    "vocab": "a vocabulary without weights", "mmproj": "the projector of a vision or audio model",
}  # fmt: skip


class GgufModel:
    """A GGUF model, open for reading; see ``model.Source`` for the methods."""

    kind = "gguf"
    revision: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.parts = open_parts(path)
        try:
            self._metadata = self.parts[0].metadata
            self._shape = self._read_shape()
        except BaseException:
            self.close()
            raise

    def shape(self) -> ModelShape:
        """Sizes and constants from the metadata; bfloat16 where all matrices are, else float16 or float32."""
        return self._shape

    def tokenizer_files(self) -> dict[str, bytes]:
        """A Hugging Face tokenizer made of the file's vocabulary, and generation_config.json."""
        read = gguf_tokenizer.read(self._metadata, self._shape.vocab_size, self.path)
        return vocabulary.files(read) | {tokenizer_files.GENERATION_CONFIG: self.generation_config()}

    def generation_config(self) -> bytes:
        """The ids of the tokens that begin and end a text."""
        begin, ends = gguf_tokenizer.special_ids(self._metadata, self._shape.vocab_size, self.path)
        return vocabulary.generation_config(begin, ends)

    def tensors(self) -> dict[str, SourceTensor]:
        """The model's tensors by their Hugging Face names; raises ModelError for a set that is not a Nemotron's."""
        found = {}
        for part in self.parts:
            for name, entry in part.entries.items():
                theirs = hugging_face_name(name)
                found[theirs] = self._tensor(part, name, theirs, entry)
        return model.complete(found, self._shape, self.path)

    def provenance(self) -> Provenance:
        """How each tensor is stored, and what was lost when the file was made."""
        types = {
            hugging_face_name(name): entry.type.name for part in self.parts for name, entry in part.entries.items()
        }
        return Provenance(types, _losses(self._matrix_types()))

    def files(self) -> dict[str, Path]:
        """The file, or the parts of a split one."""
        return {part.path.name: part.path for part in self.parts}

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, part: GgufFile, name: str, theirs: str, entry: GgufEntry) -> SourceTensor:
        if not entry.type.can_be_read:
            raise ModelError(f"{part.path}: {name} has type {entry.type.name}, which cannot be dequantised")

        def read(start: int, stop: int) -> npt.NDArray[Any]:
            return part.rows(name, start, stop)

        def read_norm(start: int, stop: int) -> npt.NDArray[Any]:
            return part.rows(name, start, stop).astype(np.float32) - np.float32(1)

        if theirs.endswith("norm.weight"):
            return SourceTensor(part.path, theirs, np.dtype(np.float32), entry.shape, read_norm)
        return SourceTensor(part.path, theirs, entry.type.dtype, entry.shape, read)

    def _matrix_types(self) -> Counter[str]:
        """Types of the matrices, with how many tensors have each, the most frequent first."""
        entries = [entry for part in self.parts for entry in part.entries.values()]
        return Counter(entry.type.name for entry in entries if len(entry.shape) > 1)

    def _read_shape(self) -> ModelShape:
        found = self._metadata.get("general.architecture")
        self._check_kind()
        if found != ARCHITECTURE:
            raise ModelError(f"{self.path}: its architecture is {found!r}, and only {ARCHITECTURE!r} can be converted")
        config = {ours: self._key(key) for ours, key in _REQUIRED.items()}
        config |= {ours: self._key(key, None) for ours, key in _OPTIONAL.items()}
        config |= {"vocab_size": self._vocab_size(), "rope_theta": self._key("rope.freq_base", _BASE)}
        for ours in ("norm_eps", "rope_theta"):
            config[ours] = _shortest(config[ours])
        config |= {"architectures": [shapes.ARCHITECTURE], "torch_dtype": self._dtype()}
        config["tie_word_embeddings"] = not any(_OUTPUT in part.entries for part in self.parts)
        self._check_built_in(config)
        config["partial_rotary_factor"] = self._rotary_share(config)
        return shapes.from_config(config, self.path)

    def _key(self, name: str, *default: Value | None) -> Any:
        value = self._metadata.get(f"{ARCHITECTURE}.{name}", *default)
        if value is None and not default:
            raise ModelError(f"{self.path} lacks the key {ARCHITECTURE}.{name}; convert the model to GGUF again")
        return value

    def _vocab_size(self) -> Any:
        """As the metadata say, or as many rows as the embedding has; a vocabulary in the file must be of that size."""
        rows = {entry.shape[0] for part in self.parts for name, entry in part.entries.items() if name in _NAMES
                and _NAMES[name] == EMBEDDING}  # fmt: skip
        size = self._key("vocab_size", rows.pop() if rows else None)
        pieces = self._metadata.get(gguf_tokenizer.PIECES)
        if isinstance(pieces, list) and len(pieces) != size:
            raise ModelError(f"{self.path}: its vocabulary has {len(pieces)} pieces, and the model {size} rows")
        return size

    def _check_kind(self) -> None:
        kind = self._metadata.get("general.type")
        if kind is None or kind == "model":
            signs = {"adapter.type": "adapter", "imatrix.datasets": "imatrix", "clip.projector_type": "mmproj"}
            kind = next((named for key, named in signs.items() if key in self._metadata), kind)
        if kind not in _NO_MODEL and not any(part.entries for part in self.parts):
            kind = "vocab"
        if isinstance(kind, str) and kind in _NO_MODEL:
            raise ModelError(f"{self.path} is no model but {_NO_MODEL[kind]}")

    def _check_built_in(self, config: dict[str, Any]) -> None:
        """Refuse what would change the model, and rope scaling, as llama.cpp reads it."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_size = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
        sizes: dict[str, tuple[Any, ...]] = {"attention.value_length": (head_size,), "embedding_length_out": (hidden,)}
        for key, values in (_BUILT_IN | sizes).items():
            value = self._key(key, values[0])
            if not any(np.array_equal(value, one) for one in values):
                raise ModelError(f"{self.path}: {key} is {value!r}; TensorRT-LLM's Nemotron has {values[0]!r} built in")
        scaling, factor = self._key("rope.scaling.type", None), self._key("rope.scaling.factor", None)
        factor = self._key("rope.scale_linear", 0.0) if factor is None else factor
        if scaling not in (None, "none"):
            raise ModelError(
                f"{self.path}: rope.scaling.type {scaling!r} is not supported by TensorRT-LLM's Nemotron, only 'none'"
            )
        if scaling is None and factor not in (0.0, 1.0):  # llama.cpp: linear, unless said otherwise
            raise ModelError(f"{self.path}: rope.scaling.factor {factor!r} is not supported by TensorRT-LLM's Nemotron")

    def _rotary_share(self, config: dict[str, Any]) -> float:
        """The share of a head whose product with its size is the metadata's number of rotated elements again."""
        hidden, heads, rotated = config["hidden_size"], config["num_attention_heads"], self._key("rope.dimension_count")
        if not all(isinstance(number, int) and number > 0 for number in (hidden, heads, rotated)):
            raise ModelError(f"{self.path}: {hidden!r} elements in {heads!r} heads, {rotated!r} rotated, cannot be")
        size = max(hidden // heads, 1)
        share = float(rotated / size)
        return share if int(size * share) == rotated else math.nextafter(share, math.inf)

    def _dtype(self) -> str:
        kinds = set(self._matrix_types())
        return {frozenset({"BF16"}): "bfloat16", frozenset({"F32"}): "float32"}.get(frozenset(kinds), "float16")


def hugging_face_name(name: str) -> str:
    """The name that transformers has for a tensor of llama.cpp's; its own where there is none."""
    if found := _LAYER.fullmatch(name):
        layer, module, kind = found.groups()
        if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    return _NAMES.get(name, name)


def _losses(types: Counter[str]) -> tuple[str, ...]:
    quantised = sorted(types.keys() - {"F32", "F16", "BF16"})
    said = []
    if quantised:
        said.append(f"weights were quantised to {', '.join(quantised)} before: this is the checkpoint of what is left")
    if "F16" in types:
        said.append("F16 holds no magnitudes below 6e-8, and few digits below 6e-5: a bfloat16 model has lost those")
    said.append(
        "norm weights were stored plus one in float32: exact for a bfloat16 model, a float16 or float32 one has lost "
        "their last bits"
    )
    return tuple(said)


def _shortest(value: Any) -> Any:
    """The shortest decimal that gives the same float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def open_parts(path: Path) -> list[GgufFile]:
    """Open the file, with all its parts where it is the first of a split one; raises ModelError."""
    parts = [GgufFile(path)]
    try:
        count, number = parts[0].metadata.get("split.count", 0), parts[0].metadata.get("split.no", 0)
        if count in (0, 1):
            return parts
        names = _part_names(path, count, number)
        for index, name in enumerate(names[1:], 1):
            if not name.exists():
                raise ModelError(f"{name} is not there, part {index + 1} of {count} of {path.name}; get all parts")
            parts.append(GgufFile(name))
            _check_part(parts[index], index, count)
        total, wanted = sum(len(part.entries) for part in parts), parts[0].metadata.get("split.tensors.count")
        names_found = {tensor for part in parts for tensor in part.entries}
        if total != wanted or len(names_found) != total:
            raise ModelError(f"{path} and its parts have {len(names_found)} tensors, not {wanted}; get all parts again")
        return parts
    except BaseException:
        for part in parts:
            part.close()
        raise


def _part_names(path: Path, count: Value, number: Value) -> list[Path]:
    named = _PART.fullmatch(path.name)
    if not named or not isinstance(count, int) or int(named["count"]) != count or int(named["part"]) - 1 != number:
        raise ModelError(
            f"{path} says that it is part {number!r} (from 0) of {count!r}, and its name does not; give parts their "
            "names NAME-00001-of-0000N.gguf back"
        )
    names = [path.with_name(f"{named['stem']}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
    if number != 0:
        raise ModelError(f"{path} is a later part of a split file; name the first one, {names[0].name}")
    return names


def _check_part(part: GgufFile, number: int, count: Value) -> None:
    found = part.metadata.get("split.no"), part.metadata.get("split.count")
    if found != (number, count):
        raise ModelError(f"{part.path} says that it is part {found[0]!r} (from 0) of {found[1]!r}; get all parts again")
