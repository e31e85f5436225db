"""What every engine folder has, whatever runs it: limits, a TensorRT-LLM style config.json, the tokenizer, a manifest.

``config.json`` has the three keys of a TensorRT-LLM engine (``version``, ``pretrained_config``, ``build_config``;
TensorRT-LLM 1.2 ``builder.py``), so that whoever reads an engine's limits reads them in one way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.errors import CheckpointError
from minitron.model import tokenizer_files
from minitron.model.runtime_limits import TOKENS_PER_BLOCK
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.plan.limits import Limits

TOKENIZER = "tokenizer"


def checkpoint_input(folder: Path) -> manifest.Input:
    """What the engine's manifest says about its checkpoint.

    Raises CheckpointError where a file is not what the checkpoint's manifest records. Files that still have the
    recorded size and time are not read again. A checkpoint without a manifest (the official converter writes none) is
    hashed.
    """
    if not (folder / manifest.NAME).is_file():
        names = [name for name in files.tree_files(folder) if Path(name).suffix in (".json", ".safetensors")]
        records = {name: manifest.FileRecord.of(folder / name) for name in names}
        return manifest.Input("checkpoint", str(folder), manifest.digest_of(records))
    made_from, record = manifest.input_of(folder, "checkpoint")
    if not manifest.unchanged(record.files, folder):
        for name, expected in record.files.items():
            if not (folder / name).is_file() or files.sha256_file(folder / name) != expected.sha256:
                raise CheckpointError(f"{folder / name} is not what {manifest.NAME} records; convert the model again")
    return made_from


def write_config(folder: Path, version: str, checkpoint: Checkpoint, limits: Limits, **more: Any) -> None:
    """Write ``config.json``; ``more`` are keys of one target."""
    build_config = asdict(limits) | {
        "max_beam_width": 1,
        "kv_cache_type": "PAGED",
        "gather_context_logits": False,
        "gather_generation_logits": False,
        "plugin_config": {"tokens_per_block": TOKENS_PER_BLOCK},
    }
    config = {"version": version, "pretrained_config": checkpoint.config, "build_config": build_config} | more
    files.write_text(folder / "config.json", json.dumps(config, indent=4) + "\n")


def copy_tokenizer(checkpoint: Path, engine: Path, given: Mapping[str, bytes] | None = None) -> bool:
    """Take the tokenizer's files along; False where the model came without (generation_config.json alone is none).

    ``given``: files by name that take the place of the checkpoint's.
    """
    if given is not None:
        (engine / TOKENIZER).mkdir()
        for name, content in given.items():
            (engine / TOKENIZER / name).write_bytes(content)
    elif (checkpoint / TOKENIZER).is_dir():
        shutil.copytree(checkpoint / TOKENIZER, engine / TOKENIZER)
    return (engine / TOKENIZER / tokenizer_files.TOKENIZER).is_file()


def tokenizer_key(given: Mapping[str, bytes] | None) -> dict[str, str]:
    """What a tokenizer that was given adds to the ingredients of an engine."""
    if given is None:
        return {}
    return {"tokenizer": hashlib.sha256(b"".join(given[name] for name in sorted(given))).hexdigest()}


def details(target: str, checkpoint: Checkpoint, limits: Limits, **more: Any) -> dict[str, Any]:
    """What the manifest of an engine tells the stages after it."""
    return {
        "target": target,
        "precision": checkpoint.precision.value,
        "dtype": checkpoint.dtype,
        "limits": asdict(limits),
        "vocab_size": checkpoint.shape.vocab_size,
    } | more
