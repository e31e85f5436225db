"""Build a TensorRT engine: plan, cache, trtllm-build here or in the pinned image, check, manifest."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.errors import CheckpointError, MachineError, NotEnoughMemory, ToolError, UsageError
from minitron.machine import compat, gpus_here
from minitron.machine.compat import Image
from minitron.machine.gpu import Gpu
from minitron.recipe import Effective
from minitron.recipe_model import Recipe
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.engines import cache, folder
from minitron_build.engines.cache import EngineKey
from minitron_build.engines.tensorrt import check, container, flags, process
from minitron_build.engines.tensorrt.flags import Value
from minitron_build.plan.engine_plan import EnginePlan
from minitron_build.plan.engine_plan import plan as plan_recipe
from minitron_build.plan.for_checkpoint import plan_checkpoint
from minitron_build.plan.model import look_up
from minitron_build.sources.huggingface import tokenizer_of

log = logging.getLogger(__name__)

#: Where trtllm-build writes its timing cache: into the new engine's folder, from where it is taken on success.
_TIMING_CACHE = ".timing.cache"
_REASON = "REJECTED.txt"
#: An engine is at most its weights, plus plans and tables; for checking the disk before the start.
_ENGINE_EXTRA_BYTES = 512 << 20


@dataclass(frozen=True)
class Options:
    """How to build, beside what. ``workers``: ranks at a time (None: all). ``timeout_s``: None waits for ever.

    ``tokenizer``: folder of one to take instead of the checkpoint's.
    """

    container: bool = False
    workers: int | None = None
    timeout_s: float | None = None
    force: bool = False
    tokenizer: Path | None = None

    def tokenizer_files(self, vocab_size: int) -> dict[str, bytes] | None:
        """The tokenizer that was given, for an engine of so many tokens; raises what ``tokenizer_of`` raises."""
        return tokenizer_of(self.tokenizer, vocab_size) if self.tokenizer else None


@dataclass(frozen=True)
class EngineBuild:
    """A build that is decided: what ``run`` does and ``command`` shows."""

    checkpoint: Path
    output: Path
    recipe: Recipe
    plan: EnginePlan
    gpu: Gpu
    image: Image
    key: EngineKey
    options: Options

    def command(self, partial: Path | None = None) -> list[str]:
        """The command line; ``partial`` is the folder that becomes the output (by default the output itself)."""
        return self.command_and_flags(partial or self.output, container.new_name())[0]

    def command_and_flags(self, partial: Path, container_name: str) -> tuple[list[str], dict[str, Value]]:
        """The command line, and the flags of trtllm-build in it by name."""
        known = timing_cache(self.key)
        where = container if self.options.container else None
        seen_cache = (where.CACHE if where else known.parent) / known.name
        seen_output = where.ENGINE if where else partial.absolute()
        chosen = flags.arguments(
            self.plan,
            where.CHECKPOINT if where else self.checkpoint.absolute(),
            seen_output,
            output_timing_cache=seen_output / _TIMING_CACHE,
            input_timing_cache=seen_cache if known.is_file() else None,
            workers=self.options.workers,
            more=self.recipe.trtllm_build,
        )
        argv = flags.argv(chosen)
        if where:
            mounts = container.Mounts(self.checkpoint, partial, known.parent)
            argv = where.wrap(argv, self.image.reference, mounts, name=container_name, container=self.recipe.container)
        return argv, chosen


def timing_cache(key: EngineKey) -> Path:
    """TensorRT's timing cache of one version and architecture, under XDG_CACHE_HOME, never in the current directory."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "minitron-trtllm" / f"timing-{key.runtime.replace(' ', '-')}-{key.architecture}.cache"


def decide(effective: Effective, checkpoint: Path, output: Path | None, options: Options) -> EngineBuild:
    """Plan the engine of a checkpoint folder and where it goes; nothing is written.

    Raises CheckpointError, UsageError, NotEnoughMemory.
    """
    with Checkpoint.open(checkpoint) as source:
        plan = plan_checkpoint(effective, source)
        _check_layout(source, plan)
        made_from = folder.checkpoint_input(checkpoint)
    return _decide(effective.recipe, plan, made_from.digest, checkpoint=checkpoint, output=output, options=options)


def decide_ahead(effective: Effective, checkpoint: Path, output: Path | None, options: Options) -> EngineBuild:
    """The same for a checkpoint that is not there yet, for showing the command: planned from the recipe's model."""
    recipe = effective.recipe
    log.warning("%s is not there yet: planned from the recipe's model", checkpoint)
    plan = plan_recipe(recipe, look_up(recipe.model))
    return _decide(recipe, plan, "not there yet", checkpoint=checkpoint, output=output, options=options)


def _decide(
    recipe: Recipe, plan: EnginePlan, source_digest: str, *, checkpoint: Path, output: Path | None, options: Options
) -> EngineBuild:
    image = compat.image(recipe.container.image_tag)
    compat.check_can_build(image)
    if not plan.fits:
        raise NotEnoughMemory(f"{plan.notes[0]}; what would: {'; or '.join(plan.remedies)}")
    if plan.gpu is None:
        raise UsageError(f"target {plan.target} is no GPU")
    version = image.tensorrt_llm if options.container else installed_version() or image.tensorrt_llm
    key = EngineKey(
        source=source_digest,
        precision=plan.precision.value,
        dtype=plan.dtype,
        plan=plan.identity()
        | {"trtllm_build": dict(recipe.trtllm_build)}
        | folder.tokenizer_key(options.tokenizer_files(plan.model.shape.vocab_size)),
        runtime=f"tensorrt-llm {version}",
        architecture=plan.gpu.architecture,
    )
    place = output or cache.default_output(f"{checkpoint.absolute().name}-{plan.target}", key)
    return EngineBuild(
        checkpoint=checkpoint,
        output=place,
        recipe=recipe,
        plan=plan,
        gpu=plan.gpu,
        image=image,
        key=key,
        options=options,
    )


def run(build: EngineBuild) -> tuple[manifest.Manifest, bool]:
    """Build the engine, or find it built: its manifest, and whether it was there already.

    ``force`` replaces something else at the output; an engine that is what was asked for is kept. The output appears
    only when trtllm-build ended well and left what was asked for; its log is beside it, under ``NAME.build.log``.
    One that trtllm-build made and the check did not take is kept beside it, as ``NAME.rejected``. Raises OutputExists,
    NoSpace, MissingDependency, MachineError, NotEnoughMemory, ToolError.
    """
    found = cache.find(build.output, build.key)
    if found:
        return found, True
    cache.check_free(build.output, force=build.options.force)
    if not build.options.container:
        _check_this_gpu(build)
    for note in build.plan.notes:
        log.warning("%s", note)
    container_name = container.new_name()
    log_file = build.output.absolute().with_name(build.output.name + ".build.log")
    known = timing_cache(build.key)
    known.parent.mkdir(parents=True, exist_ok=True)
    needed = build.plan.memory.weight_bytes * build.plan.parallel.world_size + _ENGINE_EXTRA_BYTES
    with (
        Checkpoint.open(build.checkpoint) as source,
        files.new_folder(build.output, force=build.options.force, needed_bytes=needed) as partial,
    ):
        argv, chosen = build.command_and_flags(partial, container_name)
        done = process.run(
            argv, log_file, cwd=partial, timeout_s=build.options.timeout_s,
            stop=(lambda: container.stop(container_name)) if build.options.container else None,
        )  # fmt: skip
        peak = container.take_peak_bytes(partial) if build.options.container else done.peak_bytes
        version = build.key.runtime.partition(" ")[2]
        try:
            check.check(partial, source, chosen, version)
        except ToolError as error:
            raise ToolError(f"{error}; {_keep_rejected(partial, build.output, str(error), argv)}") from error
        _keep_timing_cache(partial / _TIMING_CACHE, known)
        given = build.options.tokenizer_files(source.shape.vocab_size)
        details = _details(build, source, version, folder.copy_tokenizer(build.checkpoint, partial, given))
        made_from = folder.checkpoint_input(build.checkpoint)
        record = manifest.write(
            partial, "engine", made_from,
            arguments={"target": build.plan.target, "argv": argv},
            details=details | {"build_seconds": round(done.seconds, 1), "build_peak_bytes": peak},
        )  # fmt: skip
    return record, False


def installed_version() -> str | None:
    """The TensorRT-LLM that the trtllm-build on PATH belongs to, asked of the Python that runs it; None if unknown."""
    program = shutil.which(flags.PROGRAM)
    if program is None:
        return None
    with open(program, "rb") as script:
        first = script.readline().decode("utf-8", "replace").strip()
    if not first.startswith("#!"):
        return None
    ask = "import importlib.metadata as m; print(m.version('tensorrt_llm'))"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run([*first[2:].split(), "-c", ask], capture_output=True, text=True, timeout=60, check=False)
        if told.returncode == 0:
            return told.stdout.strip() or None
    return None


def _check_layout(source: Checkpoint, plan: EnginePlan) -> None:
    if source.spec.group_size or source.precision.has_eight_bit_activations:
        return  # laid out when the engine is built
    if plan.gpu and source.quantized and plan.gpu.code_layout != "sm80":
        raise CheckpointError(
            f"{source.folder} holds codes in the layout of sm80, and {plan.target} is {plan.gpu.architecture}; convert "
            f"the model with --target {plan.target} (or --quantize-at-build), which leaves that to trtllm-build"
        )


def _check_this_gpu(build: EngineBuild) -> None:
    """Refuse to build here for another GPU; where nvidia-smi is missing trtllm-build will say what it lacks."""
    here = {gpu.compute_capability for gpu in gpus_here.gpus()}
    if here and build.gpu.compute_capability not in here:
        raise MachineError(
            f"{build.plan.target} has compute capability {build.gpu.compute_capability} and the GPU here "
            f"{', '.join(sorted(here))}; an engine must be built on the kind of GPU that runs it"
        )


def _keep_rejected(partial: Path, output: Path, reason: str, argv: list[str]) -> str:
    """Keep what an hour made and our check did not take, beside the output, and say where; an older one makes room."""
    rejected = output.absolute().with_name(output.name + ".rejected")
    if rejected.exists() and not (rejected / _REASON).is_file():
        return f"it was not kept: {rejected} holds something else"
    shutil.rmtree(rejected, ignore_errors=True)
    rejected.mkdir()
    for made in partial.iterdir():
        made.rename(rejected / made.name)
    files.write_text(rejected / _REASON, f"{reason}\n\n{shlex.join(argv)}\n")
    return f"it is kept as {rejected}, with the reason in {_REASON}"


def _keep_timing_cache(made: Path, known: Path) -> None:
    if made.is_file():
        with contextlib.suppress(OSError):
            shutil.copyfile(made, known.with_suffix(".new"))
            os.replace(known.with_suffix(".new"), known)
        made.unlink()


def _details(build: EngineBuild, source: Checkpoint, version: str, has_tokenizer: bool) -> dict[str, Any]:
    plan = build.plan
    return folder.details(
        plan.target,
        source,
        plan.limits,
        has_tokenizer=has_tokenizer,
        tensorrt_llm=version,
        architecture=build.gpu.architecture,
        image=build.image.tag,
        tensor_parallel=plan.parallel.tensor,
        pipeline_parallel=plan.parallel.pipeline,
        kv_cache_free_gpu_mem_fraction=plan.kv_cache_free_gpu_mem_fraction,
        plan=plan.document(),
        cache=build.key.record(),
    )
