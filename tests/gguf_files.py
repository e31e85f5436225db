"""GGUF files for tests, written from a Hugging Face folder as llama.cpp's converter does it, in plain struct and numpy.

Written from the format's description (ggml-org/ggml docs/gguf.md) and llama.cpp's ``conversion/nemotron.py``, nothing
of the code under test. ``make_gguf_fixtures.py`` has llama.cpp itself run the files, and records their hashes: the
same arguments give the same bytes, so that a test can say that llama.cpp took the very file it uses.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import sentencepiece
from safetensors import safe_open

#: ggml's number of a type, and the numpy type of its elements.
TYPES: dict[str, tuple[int, Any]] = {"F32": (0, np.float32), "F16": (1, np.float16), "BF16": (30, ml_dtypes.bfloat16)}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ALIGNMENT = 32

Tensor = tuple[str, tuple[int, ...], int, bytes]  # name, shape as numpy has it, ggml type, bytes
Entry = tuple[str, tuple[int, ...], int, int]  # the same with the number of bytes, for those that come later
U16, U32, I32, F32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
Field = tuple[int, Any]  # type of the value and the value; arrays as (ARRAY, (type of items, items))


def write(path: Path, metadata: Mapping[str, Field], tensors: Sequence[Tensor], version: int = 3) -> None:
    """Write one GGUF file."""
    entries = [(name, shape, kind, len(data)) for name, shape, kind, data in tensors]
    write_pieces(path, metadata, entries, ([data] for _, _, _, data in tensors), version)


def write_pieces(
    path: Path,
    metadata: Mapping[str, Field],
    tensors: Sequence[Entry],
    data: Iterable[Iterable[bytes]],
    version: int = 3,
) -> None:
    """Write one GGUF file; the bytes of each tensor come in pieces, so that no tensor need be in memory whole."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    head += b"".join(
        _string(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind, value) in metadata.items()
    )
    offset = 0
    for name, shape, kind, length in tensors:
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)
        offset += length + -length % _ALIGNMENT
    with open(path, "wb") as file:
        file.write(head + b"\0" * (-len(head) % _ALIGNMENT))
        for (name, _, _, length), pieces in zip(tensors, data, strict=True):
            written = sum(file.write(piece) for piece in pieces)
            assert written == length, f"{name}: {written} bytes, not {length}"
            file.write(b"\0" * (-length % _ALIGNMENT))


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        items, values = value
        return struct.pack("<IQ", items, len(values)) + b"".join(_value(items, item) for item in values)
    return struct.pack({U16: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def metadata_of(model: Path) -> dict[str, Field]:
    """The keys that llama.cpp's converter writes for a Nemotron."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    rotated = int(config["partial_rotary_factor"] * config["hidden_size"]) // heads
    return {
        "general.architecture": (STRING, "nemotron"),
        "nemotron.block_count": (U32, config["num_hidden_layers"]),
        "nemotron.context_length": (U32, config["max_position_embeddings"]),
        "nemotron.embedding_length": (U32, config["hidden_size"]),
        "nemotron.feed_forward_length": (U32, config["intermediate_size"]),
        "nemotron.attention.head_count": (U32, heads),
        "nemotron.attention.head_count_kv": (U32, config["num_key_value_heads"]),
        "nemotron.rope.freq_base": (F32, config["rope_theta"]),
        "nemotron.attention.layer_norm_epsilon": (F32, config["norm_eps"]),
        "nemotron.vocab_size": (U32, config["vocab_size"]),
        "nemotron.rope.dimension_count": (U32, rotated),
        "nemotron.rope.scaling.type": (STRING, "none"),
    } | _tokenizer(model, config["vocab_size"])


def _tokenizer(model: Path, size: int) -> dict[str, Field]:
    """Pieces, scores and types of tokenizer.model; the special ones of tokenizer_config.json are of type control."""
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {int(token) for token, entry in config["added_tokens_decoder"].items() if entry["special"]}
    reader = sentencepiece.SentencePieceProcessor()
    reader.LoadFromFile(str(model / "tokenizer.model"))
    ids = range(size)
    types = [3 if i in special else 5 if reader.IsUnused(i) else 6 if reader.IsByte(i) else 1 for i in ids]
    ids_of = {entry["content"]: int(token) for token, entry in config["added_tokens_decoder"].items()}
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [reader.IdToPiece(i) for i in ids])),
        "tokenizer.ggml.scores": (ARRAY, (F32, [reader.GetScore(i) for i in ids])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.bos_token_id": (U32, ids_of[config["bos_token"]]),
        "tokenizer.ggml.eos_token_id": (U32, ids_of[config["eos_token"]]),
        "tokenizer.ggml.unknown_token_id": (U32, 1),  # wrong, as llama.cpp's converter has it
        "tokenizer.ggml.padding_token_id": (U32, 0),  # likewise
        "tokenizer.ggml.add_bos_token": (BOOL, config["add_bos_token"]),
        "tokenizer.ggml.add_eos_token": (BOOL, config["add_eos_token"]),
    }


def tensors_of(model: Path, kind: str) -> list[Tensor]:
    """Matrices in the type ``kind``, norms plus one in float32."""
    found = []
    with safe_open(model / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            values = file.get_tensor(name).astype(np.float32)
            if name.endswith("norm.weight"):
                values = values + np.float32(1)
            number, dtype = TYPES["F32" if values.ndim == 1 else kind]
            found.append((llama_cpp_name(name), values.shape, number, values.astype(dtype).tobytes()))
    return found


def llama_cpp_name(name: str) -> str:
    """``blk.0.attn_q.weight`` for ``model.layers.0.self_attn.q_proj.weight``."""
    module, _, part = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{part}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{part}"


def write_model(model: Path, folder: Path, kind: str, parts: int = 1) -> Path:
    """Write ``model`` as one file or as a split one; returns the (first) file."""
    metadata, tensors = metadata_of(model), tensors_of(model, kind)
    if parts == 1:
        write(folder / f"{model.name}-{kind}.gguf", metadata, tensors)
        return folder / f"{model.name}-{kind}.gguf"
    each = -(-len(tensors) // parts)
    names = [folder / f"{model.name}-{kind}-{part + 1:05d}-of-{parts:05d}.gguf" for part in range(parts)]
    for part, name in enumerate(names):
        split = {"split.no": (U16, part), "split.count": (U16, parts), "split.tensors.count": (I32, len(tensors))}
        write(name, (metadata if part == 0 else {}) | split, tensors[part * each : (part + 1) * each])
    return names[0]


def file_and_parts(first: Path) -> Iterable[Path]:
    """The file itself, or all parts of the split one that begins with it."""
    stem, split, rest = first.name.partition("-00001-of-")
    return sorted(first.parent.glob(f"{stem}-*-of-{rest}")) if split else [first]
