"""Find out what kind of model a user names, and open it."""

from __future__ import annotations

from pathlib import Path

from minitron_trtllm.errors import ModelError, UsageError
from minitron_trtllm.source.model import Source


def open_model(model: str, revision: str | None = None) -> Source:
    """Open a local folder, or a Hugging Face id (which downloads what is missing); raises ModelError, UsageError."""
    folder = Path(model)
    if folder.is_dir():
        from minitron_trtllm.source.huggingface import HuggingFaceModel

        if revision is not None:
            raise UsageError(f"--revision {revision} is for Hugging Face ids, and {model} is a local folder")
        return HuggingFaceModel(folder)
    raise ModelError(f"{model} is no model folder here")
