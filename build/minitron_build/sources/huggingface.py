"""A Hugging Face model folder: config.json, one or many safetensors files (with or without an index), a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minitron.errors import ModelError, UsageError
from minitron.model import shape as shapes
from minitron.model import tokenizer_files, weight_files
from minitron.model.shape import ModelShape
from minitron_build.sources import model, sentencepiece_model
from minitron_build.sources.model import SourceTensor
from minitron_build.sources.safetensors import DTYPES, SafetensorsEntry, SafetensorsFile

GENERATION_CONFIG = tokenizer_files.GENERATION_CONFIG
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: Buffers that some exports wrote beside the weights, wherever they hang; the tables are computed anew.
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")
#: Names of a model that was saved without its head, or inside another one; transformers loads them too.
_BARE, _DOUBLE = re.compile(r"(embed_tokens|layers|norm)\."), "model.model."


class HuggingFaceModel:
    """A model folder, open for reading; see ``model.Source`` for the methods.

    ``path`` and ``revision`` are what the manifest shall say, where that is not the folder itself; ``names`` are all
    files of the model, where the folder holds only those that are needed.
    """

    kind = "huggingface"

    def __init__(
        self, folder: Path, path: str | None = None, revision: str | None = None, names: Collection[str] | None = None
    ) -> None:
        self._folder, self.path, self.revision = folder, path or str(folder), revision
        names = names or [item.name for item in folder.iterdir() if item.is_file()]
        weight_files.refuse_adapter(names, self.path)
        self._config = shapes.load(folder / "config.json")
        self._shape = shapes.from_config(self._config, str(folder / "config.json"))
        self._weights = weight_files.choose(names, self._config, folder.joinpath, str(folder))
        self._shards: list[SafetensorsFile] = []
        try:
            for name in self._weights.names:
                self._shards.append(SafetensorsFile(folder / name))
            self._check_index()
        except BaseException:
            self.close()
            raise

    def shape(self) -> ModelShape:
        """Sizes and constants from config.json."""
        return self._shape

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files that exist, and generation_config.json."""
        return read_tokenizer(self._folder) | {GENERATION_CONFIG: self.generation_config()}

    def generation_config(self) -> bytes:
        """generation_config.json, made from the ids that config.json says where there is none, as by transformers."""
        return _generation_config(self._folder, self._config)

    def tensors(self) -> dict[str, SourceTensor]:
        """The model's tensors; raises ModelError for a set that is not exactly a Nemotron's."""
        found: dict[str, SourceTensor] = {}
        for shard in self._shards:
            for name, entry in shard.entries.items():
                plain = _plain_name(name)
                if plain in found:
                    where = "there under another name" if found[plain].file == shard.path else "in another file"
                    raise ModelError(f"{shard.path}: tensor {name} is {where} of {self._folder} too")
                if not _COMPUTED.fullmatch(name):
                    found[plain] = _tensor(shard, name, entry)
        return model.complete(found, self._shape, str(self._folder))

    def provenance(self) -> model.Provenance:
        """Nothing is known to have happened to the weights; which of two sets they are."""
        return model.Provenance(remarks=self._weights.remarks)

    def files(self) -> dict[str, Path]:
        """config.json, the weights, their index, the tokenizer: those that exist."""
        index = (self._weights.index,) if self._weights.index else ()
        others = ("config.json", *index, GENERATION_CONFIG, *tokenizer_files.NAMES)
        paths = [self._folder / name for name in others] + [shard.path for shard in self._shards]
        return {path.name: path for path in paths if path.exists()}

    def _check_index(self) -> None:
        if self._weights.index is None:
            return
        by_name, index = {shard.path.name: shard for shard in self._shards}, self._folder / self._weights.index
        for tensor, file in weight_files.weight_map(index).items():
            if tensor not in by_name[file].entries:
                lacks = f"{self._folder / file} lacks tensor {tensor}"
                raise ModelError(f"{lacks}, which {index.name} says is there; get both again")

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """Content of a tokenizer's files in ``folder`` by name; none where there is no tokenizer. Raises ModelError.

    A SentencePiece model alone becomes a tokenizer.json, which is what the server reads.
    """
    found = tokenizer_files.read(folder)
    if tokenizer_files.TOKENIZER in found or tokenizer_files.SENTENCEPIECE not in found:
        return found
    return found | sentencepiece_model.files(found, str(folder / tokenizer_files.SENTENCEPIECE))


def tokenizer_of(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """A tokenizer's files in ``folder``, for an engine of ``vocab_size`` tokens whose checkpoint brought none.

    With generation_config.json, made where there is none of the ids that a config.json beside it says. Raises
    ModelError, InputError where it cannot be served, UsageError where there is none.
    """
    found = read_tokenizer(folder)
    if tokenizer_files.TOKENIZER not in found:
        raise UsageError(f"--tokenizer {folder} has no {tokenizer_files.TOKENIZER}")
    config = folder / "config.json"
    said = _generation_config(folder, shapes.load(config) if config.is_file() else {})
    found[GENERATION_CONFIG] = tokenizer_files.usable_ids(said, vocab_size, f"{folder}/{GENERATION_CONFIG}")
    tokenizer_files.check(found, vocab_size, str(folder))
    return found


def _generation_config(folder: Path, config: Mapping[str, Any]) -> bytes:
    if (folder / GENERATION_CONFIG).exists():
        return (folder / GENERATION_CONFIG).read_bytes()
    ids = {key: config[key] for key in _IDS if config.get(key) is not None}
    return (json.dumps(ids, indent=2) + "\n").encode()


def _plain_name(name: str) -> str:
    """The name that transformers' NemotronForCausalLM has for it."""
    return f"model.{name}" if _BARE.match(name) else name.removeprefix("model.") if name.startswith(_DOUBLE) else name


def _tensor(shard: SafetensorsFile, name: str, entry: SafetensorsEntry) -> SourceTensor:
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise ModelError(f"{shard.path}: {name} has dtype {entry.dtype}; F32, F16 and BF16 can be converted")
    return SourceTensor(
        shard.path, name, DTYPES[entry.dtype], entry.shape, lambda start, stop: shard.rows(name, start, stop)
    )
