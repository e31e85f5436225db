"""A model by its Hugging Face id: fetch the files that converting needs, and only those.

Downloading, resuming, the cache, tokens and proxies are huggingface_hub's; HF_ENDPOINT, HF_HOME, HF_TOKEN and the other
variables it knows work as everywhere. Only a mirror on this very machine is reached without the environment's proxies.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from minitron.errors import ModelError
from minitron.model import shape as shapes
from minitron.model import tokenizer_files, weight_files
from minitron.text import proxy
from minitron_build.sources.huggingface import HuggingFaceModel

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(model: str) -> bool:
    """Whether ``model`` has the form owner/name."""
    return _ID.fullmatch(model) is not None


def open_id(model: str, revision: str | None) -> HuggingFaceModel:
    """Fetch what is not in the cache yet and open it; raises ModelError.

    config.json comes first, so that a model of another family costs nothing. Without a network the cached files serve.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    endpoint = urlsplit(constants.ENDPOINT)
    address = f"{endpoint.hostname}:{endpoint.port or ''}"
    variable = proxy.of_http(address, kinds=(endpoint.scheme, "all"))
    advice = proxy.advice(variable, address)
    try:
        with contextlib.nullcontext() if variable else proxy.set_aside():
            folder, names = _fetch_revision(model, revision)
    except errors.GatedRepoError:
        raise ModelError(f"{model} is gated: accept its licence on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision}; --revision takes a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{model} is neither a folder here nor a model on Hugging Face (or it is private)") from None
    except errors.HFValidationError:
        raise ModelError(f"{model} is neither a folder here nor a valid Hugging Face id") from None
    except (errors.HTTPError, OSError) as cause:  # type: ignore[attr-defined]  # its HTTP library's base class
        folder, names = _cached(model, revision, cause, advice), None
    except (ImportError, ValueError) as cause:
        if variable is None:
            raise
        # Its HTTP library has no part for such a proxy (SOCKS), or knows no such kind; it shows no password.
        folder, names = _cached(model, revision, cause, advice), None
    return HuggingFaceModel(folder, path=model, revision=folder.name, names=names)


def _fetch_revision(model: str, revision: str | None) -> tuple[Path, set[str] | None]:
    from huggingface_hub import HfApi

    found = HfApi().model_info(model, revision=revision)
    names = {sibling.rfilename for sibling in found.siblings or []}
    return _fetch_all(model, revision or "main", names), names


def _fetch_all(model: str, revision: str, names: set[str]) -> Path:
    """Fetch the needed ones of the repository's files ``names``; the folder in the cache, named by the commit."""
    weight_files.refuse_adapter(names, model)
    config = _fetch(model, revision, "config.json", names)
    shapes.read(config)
    folder = config.parent

    def get(name: str) -> Path:
        return _fetch(model, folder.name, name, names)

    weights = weight_files.choose(names, shapes.load(config), get, model)
    others = names.intersection((tokenizer_files.GENERATION_CONFIG, *tokenizer_files.NAMES))
    for name in sorted(others.union(weights.names)):
        get(name)
    return folder


def _fetch(model: str, revision: str, name: str, names: set[str]) -> Path:
    from huggingface_hub import hf_hub_download

    if name not in names:
        raise ModelError(f"{model} has no {name}, so it is no complete model")
    return Path(hf_hub_download(model, name, revision=revision))


def _cached(model: str, revision: str | None, cause: Exception, advice: str) -> Path:
    """The folder that an earlier run has fetched, where Hugging Face does not answer now."""
    from huggingface_hub import try_to_load_from_cache

    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    config = try_to_load_from_cache(model, "config.json", revision=revision or "main")
    if not isinstance(config, str) or not _is_complete(Path(config).parent):
        raise ModelError(f"{model} could not be fetched ({reason}); run the same command again to go on{advice}")
    log.warning("Hugging Face does not answer (%s%s); using %s as fetched before", reason, advice, model)
    return Path(config).parent


def _is_complete(folder: Path) -> bool:
    names = [item.name for item in folder.iterdir()]
    try:
        weights = weight_files.choose(names, shapes.load(folder / "config.json"), folder.joinpath, str(folder))
    except ModelError:
        return False
    return all((folder / name).exists() for name in weights.names)
