"""The repository for TensorRT-LLM's LLM API: the way forward from 1.3 on, where there are no engines any more.

It takes a Hugging Face folder as it is, in 16 bits; int8 and int4 weight-only exist for engines only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minitron import documents, files
from minitron.artifacts import manifest
from minitron.artifacts.problem import Problem, error
from minitron.errors import InputError, RepositoryError, UsageError
from minitron.machine import compat
from minitron.model import shape, tokenizer_files, weight_files
from minitron.model.precision import resolved
from minitron.recipe_model import Recipe
from minitron_triton.repository import config_text, tensors, writing
from minitron_triton.repository.differences import differences
from minitron_triton.repository.layout import ModelConfig
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.server import container
from minitron_triton.server.launch import Served

log = logging.getLogger(__name__)

NAME = "tensorrt_llm"
_YAML = f"{NAME}/1/model.yaml"
#: Arguments of LLM (tensorrt_llm/llmapi/llm_args.py, 1.2) that we set, beside ``triton_config``, which is Triton's.
ARGUMENTS = frozenset(
    {"model", "backend", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_input_len",
     "max_seq_len", "max_num_tokens", "kv_cache_config", "triton_config"}
)  # fmt: skip

_CONFIG = ModelConfig(NAME, "python", 0, tensors.LLMAPI_INPUTS, tensors.LLMAPI_OUTPUTS)


def render(
    model: Path, output: Path, recipe: Recipe, options: RepositoryOptions, *, root: str | None, force: bool, copy: bool
) -> ModelConfig:
    """Render the repository of the Hugging Face folder ``model`` into ``output``; all of it or nothing.

    Raises ModelError, EngineError (no tokenizer), UsageError, OutputError.
    """
    model, output = Path(os.path.abspath(model)), Path(os.path.abspath(output))
    dtype = _dtype(recipe, shape.read(model / "config.json").dtype)
    readable = tokenizer_files.TOKENIZER, tokenizer_files.SENTENCEPIECE
    names = ["config.json", *tokenizer_files.present(model, readable), *_weights(model)]
    seen_at = writing.root_as_seen(root, writing.CONTAINER_ROOT)
    arguments = _arguments(recipe, options, dtype, f"{seen_at}/model")
    image = compat.image(options.image.rpartition(":")[2])
    ranks = recipe.tensor_parallel * recipe.pipeline_parallel
    served = Served(output, "llmapi", (NAME,), NAME, Path(seen_at), ranks, options.image, options.shm_bytes)
    with files.new_folder(output, force=force) as folder:
        version = writing.write_model(folder, _CONFIG, "llmapi")
        writing.write(version / "model.yaml", yaml.safe_dump(arguments, sort_keys=False))
        for name in dict.fromkeys(names):
            writing.place(model / name, folder / "model" / name, copy=copy)
        composed = container.composed(served)
        text = writing.render_text(writing.COMPOSE, root=seen_at, ranks=ranks, options=options, **composed)
        writing.write(folder / "docker-compose.yaml", text)
        records = {name: manifest.FileRecord.of(folder / "model" / name) for name in dict.fromkeys(names)}
        manifest.write(
            folder, "repository",
            manifest.Input("huggingface", str(model), manifest.digest_of(records)),
            arguments={"root": root, "copy": copy, "backend": "llmapi"},
            details={
                "backend": "llmapi", "target": recipe.target, "models": [NAME], "front": NAME, "root": seen_at,
                "decoupled": True, "max_batch_size": 0, "bls_max_concurrency": options.bls_max_concurrency,
                "tokenizer_vocab_size": tokenizer_files.vocabulary_size(model), "world_size": ranks,
                "image": options.image, "shm_bytes": options.shm_bytes, "tensorrt_llm": image.tensorrt_llm,
            },
            known_sha256={f"model/{name}": record.sha256 for name, record in records.items()},
        )  # fmt: skip
    return _CONFIG


def _dtype(recipe: Recipe, stored: str | None) -> str:
    wanted, dtype = resolved(recipe.precision, recipe.dtype, stored)
    if wanted != dtype:
        raise UsageError(f"precision {wanted} needs a TensorRT engine; the LLM API takes float16 or bfloat16")
    return dtype


def _weights(model: Path) -> list[str]:
    """The files that transformers would read; the LLM API would read every *.safetensors of the folder."""
    chosen = weight_files.of_folder(model)
    for remark in chosen.remarks:
        log.warning("%s: %s", model, remark)
    return [*chosen.names, chosen.index] if chosen.index else list(chosen.names)


def _arguments(recipe: Recipe, options: RepositoryOptions, dtype: str, model: str) -> dict[str, Any]:
    """The content of model.yaml."""
    limits = {name: value for name, value in recipe.limits.model_dump().items() if value is not None}
    fraction = options.kv_cache_free_gpu_mem_fraction or 0.9
    return {
        "model": model,
        "backend": "pytorch",
        "dtype": dtype,
        "tensor_parallel_size": recipe.tensor_parallel,
        "pipeline_parallel_size": recipe.pipeline_parallel,
        **limits,
        "kv_cache_config": {
            "free_gpu_memory_fraction": fraction,
            "enable_block_reuse": options.enable_kv_cache_reuse is not False,
        },
        "triton_config": {
            "max_batch_size": 0,
            "decoupled": True,
            "cancellation_check_period_ms": options.cancellation_check_period_ms,
        },
    }


def check(folder: Path, root: str) -> Iterator[Problem]:
    """What is wrong with an LLM API repository, beyond missing files."""
    where = f"{NAME}/config.pbtxt"
    try:
        config = config_text.parse((folder / where).read_text(encoding="utf-8", errors="replace"), where)
    except (OSError, RepositoryError) as problem:
        yield error(where, "", " ".join(str(problem).split()))
    else:
        rendered = config_text.parse(writing.config_of(_CONFIG, "llmapi"), where)
        yield from differences(NAME, config, rendered, bundled=False)
    yield from _check_yaml(folder, root)


def _check_yaml(folder: Path, root: str) -> Iterator[Problem]:
    try:
        raw = documents.mapping((folder / _YAML).read_text(encoding="utf-8"), _YAML)
        settings = dict(raw["triton_config"])
    except (OSError, ValueError, KeyError, TypeError, InputError) as problem:
        yield error(_YAML, "", f"cannot be read ({' '.join(str(problem).split())}); it needs a triton_config")
        return
    for key in set(raw) - ARGUMENTS:
        yield error(_YAML, str(key), "is not an argument that this toolkit has looked at")
    if raw.get("model") != f"{root}/model":
        yield error(_YAML, "model", f"is {raw.get('model')!r}, and the repository was rendered for '{root}/model'")
    if raw.get("dtype") not in ("float16", "bfloat16"):
        yield error(_YAML, "dtype", f"is {raw.get('dtype')!r}, and float16 or bfloat16 is needed")
    for key, wanted in (("max_batch_size", 0), ("decoupled", True)):
        if settings.get(key) != wanted:
            yield error(_YAML, f"triton_config {key}", f"is {settings.get(key)!r}, and {wanted!r} is needed")
