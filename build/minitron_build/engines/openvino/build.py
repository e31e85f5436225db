"""Build a CPU engine by a recipe: the same plan and the same cache as for a GPU, around ``openvino.write``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from minitron.artifacts import manifest
from minitron.machine.cpu_execution import head_of
from minitron.recipe import Effective
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.engines import cache, folder
from minitron_build.engines.cache import EngineKey
from minitron_build.engines.openvino import write
from minitron_build.plan.for_checkpoint import plan_checkpoint
from minitron_build.sources.huggingface import tokenizer_of


def build(
    effective: Effective, checkpoint: Path, output: Path | None, *, force: bool = False, tokenizer: Path | None = None
) -> tuple[Path, manifest.Manifest, bool]:
    """Build the engine, or find it built: its folder, its manifest, and whether it was there already.

    ``tokenizer``: folder of one to take instead of the checkpoint's. Raises CheckpointError, UsageError, OutputExists,
    NoSpace, OutputError.
    """
    from minitron.machine.openvino import VERSION

    cpu = effective.recipe.cpu
    with Checkpoint.open(checkpoint) as source:
        plan = plan_checkpoint(effective, source)
        made_from = folder.checkpoint_input(checkpoint)
        given = tokenizer_of(tokenizer, source.shape.vocab_size) if tokenizer else None
        runs = write.execution(cpu.execution, source)["properties"]
    key = EngineKey(
        source=made_from.digest,
        precision=plan.precision.value,
        dtype=plan.dtype,
        plan=plan.identity() | {"overflow": cpu.overflow, "properties": runs} | folder.tokenizer_key(given),
        runtime=VERSION,
        architecture="cpu",
    )
    place = output or cache.default_output(f"{checkpoint.absolute().name}-cpu", key)
    found = cache.find(place, key)
    if found:
        return place, found, True
    cache.check_free(place, force=force)
    options = write.CpuOptions(
        execution=cpu.execution,
        lm_head=head_of(cpu.execution, cpu.lm_head),
        overflow=cpu.overflow,
        **asdict(plan.limits),
    )
    more = {"plan": plan.document(), "cache": key.record()}
    record = write.build(checkpoint, place, options, force=force, tokenizer=given, more_details=more)
    return place, record, False
