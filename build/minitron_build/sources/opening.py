"""Find out what kind of model a user names, and open it."""

from __future__ import annotations

from pathlib import Path

from minitron.errors import ModelError, UsageError
from minitron_build.sources import kinds
from minitron_build.sources.model import Source


def open_model(model: str, revision: str | None = None) -> Source:
    """Open a folder or a GGUF file, or a Hugging Face id (and fetch what is missing); raises ModelError, UsageError."""
    from minitron_build.sources import hub
    from minitron_build.sources.huggingface import HuggingFaceModel

    folder = Path(model)
    if folder.exists():
        if revision is not None:
            raise UsageError(f"--revision {revision} is for Hugging Face ids, and {model} is here")
        if folder.is_dir():
            return HuggingFaceModel(folder)
        if not kinds.is_gguf(folder):
            found = kinds.other(folder) or "a file; a model is a folder with *.safetensors files, or a GGUF file"
            raise ModelError(f"{model} is {found}")
        from minitron_build.sources.gguf import GgufModel

        return GgufModel(folder)
    if hub.is_id(model):
        return hub.open_id(model, revision)
    raise ModelError(f"{model} is not there; MODEL is a folder, a GGUF file or a Hugging Face id (owner/name)")
