"""The sizes that a plan is made for: the model's own config.json where it is at hand, else the published ones."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from minitron import data_files
from minitron.errors import ModelError, UsageError
from minitron.model import activations
from minitron.model import shape as shapes
from minitron.model.activations import Activations
from minitron.model.precision import Precision, resolved
from minitron.model.shape import ModelShape
from minitron.recipe_model import Model, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedModel:
    """A model's name, its sizes, where they were read (a path, or "published ..."), and its activations if measured."""

    source: str
    shape: ModelShape
    shape_from: str
    activations: Activations | None = None


def look_up(model: Model) -> PlannedModel:
    """Sizes of a recipe's model, without downloading anything.

    A config.json at hand (in the folder, or of the same id and revision in the Hugging Face cache) always wins; what it
    says differently from the published sizes is logged as a warning. Raises ModelError, UsageError, InputError.
    """
    measured = activations.read(model.activations) if model.activations else None
    published = _published(model.published_shape)
    config = _config_at_hand(model)
    if config is None:
        return PlannedModel(model.source, published, f"published sizes of {model.published_shape}", measured)
    shape = shapes.read(config)
    differences = [
        f"{name} {value} (published {asdict(published)[name]})"
        for name, value in asdict(shape).items()
        if value != asdict(published)[name]
    ]
    if differences:
        log.warning("%s differs from the published %s: %s", config, model.published_shape, ", ".join(differences))
    return PlannedModel(model.source, shape, str(config), measured)


def precision_of(recipe: Recipe, shape: ModelShape) -> tuple[Precision, str]:
    """Precision and activation type of a recipe, with "auto" resolved."""
    precision, dtype = resolved(recipe.precision, recipe.dtype, shape.dtype)
    return Precision(precision), dtype


def _published(name: str) -> ModelShape:
    known = data_files.names("models")
    if name not in known:
        raise UsageError(f"model.published_shape {name!r} is not known; those there are: {', '.join(known)}")
    return shapes.from_config(data_files.load(f"models/{name}.json"), f"data/models/{name}.json")


def _config_at_hand(model: Model) -> Path | None:
    folder = Path(model.source)
    if folder.is_dir():
        return folder / "config.json"
    if folder.is_file():
        return None  # a GGUF file: its sizes are read when it is converted
    if model.source.count("/") != 1 or model.source.startswith((".", "/", "~")):
        raise ModelError(f"{model.source} is neither a folder, a file nor a Hugging Face id (owner/name)")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached) if isinstance(cached, str) else None
