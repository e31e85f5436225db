"""A Hugging Face model folder: config.json, one or many safetensors files (with or without an index), a tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from minitron_trtllm import shape as shapes
from minitron_trtllm.errors import ModelError
from minitron_trtllm.shape import ModelShape
from minitron_trtllm.source import model
from minitron_trtllm.source.model import SourceTensor
from minitron_trtllm.source.safetensors import DTYPES, Entry, SafetensorsFile

INDEX = "model.safetensors.index.json"
#: What a tokenizer may consist of; any one of the first three makes a usable one.
TOKENIZER_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*TOKENIZER_CORE, "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja")  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: Buffers that old exports wrote beside the weights; the tables are computed anew.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HuggingFaceModel:
    """A model folder, open for reading; see ``model.Source`` for the methods.

    ``path`` and ``revision`` are what the manifest shall say, where that is not the folder itself.
    """

    kind = "huggingface"

    def __init__(self, folder: Path, path: str | None = None, revision: str | None = None) -> None:
        self._folder, self.path, self.revision = folder, path or str(folder), revision
        self._config = shapes.load(folder / "config.json")
        self._shape = shapes.from_config(self._config, str(folder / "config.json"))
        self._shards: list[SafetensorsFile] = []
        try:
            for name in weight_files(folder):
                self._shards.append(SafetensorsFile(folder / name))
            _check_index(folder, self._shards)
        except BaseException:
            self.close()
            raise

    def shape(self) -> ModelShape:
        """Sizes and constants from config.json."""
        return self._shape

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files that exist, and generation_config.json."""
        return tokenizer_files(self._folder) | {GENERATION_CONFIG: self.generation_config()}

    def generation_config(self) -> bytes:
        """generation_config.json, made from config.json's ids where there is none."""
        if (self._folder / GENERATION_CONFIG).exists():
            return (self._folder / GENERATION_CONFIG).read_bytes()
        ids = {key: self._config[key] for key in _IDS if self._config.get(key) is not None}
        return (json.dumps(ids, indent=2) + "\n").encode()

    def tensors(self) -> dict[str, SourceTensor]:
        """The model's tensors; raises ModelError for a set that is not exactly a Nemotron's."""
        found: dict[str, SourceTensor] = {}
        for shard in self._shards:
            for name, entry in shard.entries.items():
                if name in found:
                    raise ModelError(f"{shard.path}: tensor {name} is in another file of {self._folder} too")
                if not _COMPUTED.fullmatch(name):
                    found[name] = _tensor(shard, name, entry)
        return model.complete(found, self._shape, str(self._folder))

    def provenance(self) -> model.Provenance:
        """Nothing is known to have happened to the weights."""
        return model.Provenance()

    def files(self) -> dict[str, Path]:
        """config.json, the weights, their index, the tokenizer: those that exist."""
        others = ("config.json", INDEX, GENERATION_CONFIG, *TOKENIZER_FILES)
        paths = [self._folder / name for name in others] + [shard.path for shard in self._shards]
        return {path.name: path for path in paths if path.exists()}

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Content of a tokenizer's files in ``folder`` by name; none where there is no tokenizer."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def _tensor(shard: SafetensorsFile, name: str, entry: Entry) -> SourceTensor:
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise ModelError(f"{shard.path}: {name} has dtype {entry.dtype}; F32, F16 and BF16 can be converted")
    return SourceTensor(
        shard.path, name, DTYPES[entry.dtype], entry.shape, lambda start, stop: shard.rows(name, start, stop)
    )


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model: those its index lists, else all; raises ModelError if none."""
    if (folder / INDEX).exists():
        return sorted(set(weight_map(folder / INDEX).values()))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        old = sorted(path.name for path in folder.glob("*.bin"))
        also = f", only {old[0]}: save it again with safe_serialization=True" if old else ""
        raise ModelError(f"{folder} has no *.safetensors file{also}")
    return names


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, as an index file says; raises ModelError."""
    raw: Any = shapes.load(index).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise ModelError(f"{index} has no weight_map; get the file again, or remove it")
    for name in raw.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map names {name!r}, and only *.safetensors files beside it can be read")
    return raw


def _check_index(folder: Path, shards: list[SafetensorsFile]) -> None:
    if not (folder / INDEX).exists():
        return
    by_name = {shard.path.name: shard for shard in shards}
    for tensor, file in weight_map(folder / INDEX).items():
        if tensor not in by_name[file].entries:
            raise ModelError(f"{folder / file} lacks tensor {tensor}, which {INDEX} says is there; get both again")
