"""A model by its Hugging Face id: fetch the files that converting needs, and only those.

Downloading, resuming, the cache, tokens and proxies are huggingface_hub's; HF_ENDPOINT, HF_HOME, HF_TOKEN and the other
variables it knows work as everywhere.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from minitron_trtllm import shape as shapes
from minitron_trtllm.errors import ModelError
from minitron_trtllm.source.huggingface import (
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER_FILES,
    HuggingFaceModel,
    weight_files,
    weight_map,
)

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(model: str) -> bool:
    """Whether ``model`` has the form owner/name."""
    return _ID.fullmatch(model) is not None


def open_id(model: str, revision: str | None) -> HuggingFaceModel:
    """Fetch what is not in the cache yet and open it; raises ModelError.

    config.json comes first, so that a model of another family costs nothing. Without a network the cached files serve.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        found = HfApi().model_info(model, revision=revision)
        names = {sibling.rfilename for sibling in found.siblings or []}
        folder = _fetch_all(model, revision or "main", names)
    except errors.GatedRepoError:
        raise ModelError(f"{model} is gated: accept its licence on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision}; --revision takes a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{model} is neither a folder here nor a model on Hugging Face (or it is private)") from None
    except errors.HFValidationError:
        raise ModelError(f"{model} is neither a folder here nor a valid Hugging Face id") from None
    except (errors.HTTPError, OSError) as cause:  # type: ignore[attr-defined]  # its HTTP library's base class
        folder = _cached(model, revision, cause)
    return HuggingFaceModel(folder, path=model, revision=folder.name)


def _fetch_all(model: str, revision: str, names: set[str]) -> Path:
    """Fetch the needed ones of the repository's files ``names``; the folder in the cache, named by the commit."""
    config = _fetch(model, revision, "config.json", names)
    shapes.read(config)
    folder = config.parent
    if INDEX in names:
        weights = set(weight_map(_fetch(model, folder.name, INDEX, names)).values())
    else:
        weights = {name for name in names if name.endswith(".safetensors") and "/" not in name}
    if not weights:
        old = next((f", only {name}" for name in sorted(names) if name.endswith((".bin", ".pt", ".pth"))), "")
        raise ModelError(f"{model} has no *.safetensors file{old}; take a revision or another model that has them")
    for name in sorted(names.intersection((GENERATION_CONFIG, *TOKENIZER_FILES)) | weights):
        _fetch(model, folder.name, name, names)
    return folder


def _fetch(model: str, revision: str, name: str, names: set[str]) -> Path:
    from huggingface_hub import hf_hub_download

    if name not in names:
        raise ModelError(f"{model} has no {name}, so it is no complete model")
    return Path(hf_hub_download(model, name, revision=revision))


def _cached(model: str, revision: str | None, cause: Exception) -> Path:
    """The folder that an earlier run has fetched, where Hugging Face does not answer now."""
    from huggingface_hub import try_to_load_from_cache

    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    config = try_to_load_from_cache(model, "config.json", revision=revision or "main")
    if not isinstance(config, str) or not _is_complete(Path(config).parent):
        raise ModelError(f"{model} could not be fetched ({reason}); run the same command again to go on")
    log.warning("Hugging Face does not answer (%s); using %s as fetched before", reason, model)
    return Path(config).parent


def _is_complete(folder: Path) -> bool:
    try:
        return all((folder / name).exists() for name in weight_files(folder))
    except ModelError:
        return False
