"""A plan for a checkpoint that is there: what the checkpoint is, it is, and a recipe that says otherwise is refused."""

from __future__ import annotations

from minitron.artifacts import manifest
from minitron.errors import UsageError
from minitron.model import activations
from minitron.model.activations import Activations
from minitron.recipe import Effective
from minitron.recipe_model import Recipe
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.plan.engine_plan import EnginePlan, plan
from minitron_build.plan.model import PlannedModel


def plan_checkpoint(effective: Effective, checkpoint: Checkpoint) -> EnginePlan:
    """Plan the engine of ``checkpoint`` by ``effective``.

    Precision, type and division are the checkpoint's. Raises UsageError where the recipe, or a flag, names others.
    """
    recipe = _agreeing(effective, checkpoint)
    where = checkpoint.folder / "config.json"
    model = PlannedModel(str(checkpoint.folder), checkpoint.shape, str(where), _measured(effective.recipe, checkpoint))
    return plan(recipe, model)


def _measured(recipe: Recipe, checkpoint: Checkpoint) -> Activations | None:
    """The activations that the recipe names, else those that the checkpoint was converted with."""
    if recipe.model.activations:
        return activations.read(recipe.model.activations)
    if not (checkpoint.folder / manifest.NAME).is_file():
        return None
    kept = manifest.read(checkpoint.folder, "checkpoint").details.get("activations")
    return Activations.of(kept, str(checkpoint.folder / manifest.NAME)) if kept else None


def _agreeing(effective: Effective, checkpoint: Checkpoint) -> Recipe:
    held = {
        "precision": checkpoint.precision.value,
        "dtype": checkpoint.dtype,
        "tensor_parallel": checkpoint.tp,
        "pipeline_parallel": checkpoint.pp,
        "use_parallel_embedding": bool(checkpoint.config.get("use_parallel_embedding", False)),
        "embedding_sharding_dim": int(checkpoint.config.get("embedding_sharding_dim", 0)),
        "group_size": checkpoint.spec.group_size,
        "kv_cache": (checkpoint.spec.kv_cache or "auto").lower(),
    }
    for path, value in held.items():
        asked, origin = getattr(effective.recipe, path), effective.origins[path]
        if origin != "default" and asked not in ("auto", value):
            raise UsageError(
                f"{checkpoint.folder} holds {path} {value}, and {origin} says {asked}; convert the model again with "
                "the same recipe"
            )
    return effective.recipe.model_copy(update=held)
