"""The plan: limits, memory and roofline of one recipe on one target, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from minitron.console import human_bytes
from minitron.errors import UsageError
from minitron.machine import cpu_execution
from minitron.machine import gpu as gpus
from minitron.machine.gpu import Gpu
from minitron.model import activations
from minitron.model.precision import WRITTEN, Precision
from minitron.model.shape import ModelShape
from minitron.recipe_model import Recipe
from minitron_build.plan import memory, weights
from minitron_build.plan.gateway import GatewayPlan, for_rate
from minitron_build.plan.limits import MANY_NUM_TOKENS, Limits, derive, lengths
from minitron_build.plan.memory import MemoryPlan
from minitron_build.plan.model import PlannedModel, precision_of
from minitron_build.plan.roofline import Machine, decode_step, prefill, weight_only_pays_below
from minitron_build.plan.weights import Parallel, WeightBytes, model_bytes


@dataclass(frozen=True)
class Roofline:
    """Best possible speeds; rates in tokens/s of all sequences together, times in seconds.

    ``single``: each precision's decode rate at batch 1 with an empty cache. ``planned``: this precision's at the
    planned batch, every sequence holding ``context_tokens``. ``prefill``: one prompt of ``prompt_tokens``, the median.
    """

    single_tokens_per_s: dict[str, float]
    context_tokens: int
    planned_tokens_per_s: float
    planned_bound_by: str
    prompt_tokens: int
    prefill_s: float
    prefill_bound_by: str
    weight_only_pays_below_batch: int | None


@dataclass(frozen=True)
class EnginePlan:
    """All that is decided before building. ``document()`` is what manifests and ``--json`` hold.

    ``weights``: bytes of the undivided model for every precision. ``kv_element_bytes``: of a key's or value's element.
    ``fits``: whether at least one sequence does. ``gateway``: what it takes in front.
    ``logits_bytes``: host memory that a full batch may fill with logits.
    ``remedies``: what would hold the whole workload where this does not.
    """

    target: str
    gpu: Gpu | None
    model: PlannedModel
    precision: Precision
    dtype: str
    parallel: Parallel
    execution: str | None
    lm_head: str
    weights: dict[str, WeightBytes]
    kv_element_bytes: float
    limits: Limits
    kv_cache_free_gpu_mem_fraction: float | None
    memory: MemoryPlan
    roofline: Roofline | None
    gateway: GatewayPlan | None
    concurrency: int
    logits_bytes: int = 0
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether one sequence of the longest kind fits; true where memory is not known."""
        return self.memory.sequences_that_fit != 0

    def document(self) -> dict[str, Any]:
        """JSON values, with the sums that readers want."""
        raw = asdict(self)
        del raw["model"]["activations"]  # the notes say what follows from them
        for part in raw["weights"].values():
            part["matrices"] = part["embedding"] + part["layers"] + part["lm_head"]
            part["total"] = part["matrices"] + part["small"]
            part["lm_head_share_of_total"] = round(part["lm_head"] / part["matrices"], 4)
            part["lm_head_share_of_reads"] = round(part["lm_head"] / (part["layers"] + part["lm_head"]), 4)
        raw["fits"] = self.fits
        del raw["memory"]["cpu_peak"]
        if peak := self.memory.cpu_peak:
            sums = {"private": peak.private, "loading": peak.loading, "total": peak.total}
            raw["memory"]["peak"] = asdict(peak) | sums
        return raw | {"precision": self.precision.value, "notes": list(self.notes), "remedies": list(self.remedies)}

    def identity(self) -> dict[str, Any]:
        """The document without what may differ for the same engine: paths, remarks and, for cpu, this machine."""
        kept = self.document()
        for name in (
            "notes",
            "remedies",
            "fits",
            "logits_bytes",
            "gateway",
            *(() if self.gpu else ("memory", "roofline")),
        ):
            del kept[name]
        kept["model"] = kept["model"]["shape"]
        if self.logits_bytes:
            kept["gathers_logits"] = True
        return kept


def plan(
    recipe: Recipe, model: PlannedModel, *, machine: Machine | None = None, capacity_bytes: int | None = None
) -> EnginePlan:
    """Plan ``recipe`` for ``model``. Pure: the same arguments give the same plan.

    For target cpu, ``machine`` and ``capacity_bytes`` are this machine's, and what follows from them is left out where
    they are None. Raises UsageError where the recipe contradicts the model.
    """
    inputs = _inputs(recipe, model, machine, capacity_bytes)
    made = _plan(inputs)
    if made.memory.sequences_that_fit is None or made.memory.sequences_that_fit >= recipe.workload.concurrency:
        return made
    return replace(made, remedies=tuple(_remedies(inputs, made.memory.sequences_that_fit)))


@dataclass(frozen=True)
class _Inputs:
    """What is planned for, with everything looked up; ``held`` are the bytes of the undivided model by precision."""

    recipe: Recipe
    model: PlannedModel
    precision: Precision
    dtype: str
    parallel: Parallel
    gpu: Gpu | None
    machine: Machine | None
    capacity_bytes: int | None
    held: dict[str, WeightBytes]

    @property
    def group_size(self) -> int | None:
        """Inputs that share a 4-bit scale, with what the precision takes by itself."""
        return self.recipe.group_size or self.precision.default_group_size

    @property
    def kv_element_bytes(self) -> float:
        """Bytes of a key's or value's element."""
        if self.gpu:
            return 2 if self.recipe.kv_cache == "auto" else 1
        return cpu_execution.kv_element_bytes(self.recipe.cpu.execution, self.recipe.kv_cache)

    @property
    def shape(self) -> ModelShape:
        return self.model.shape


def _inputs(recipe: Recipe, model: PlannedModel, machine: Machine | None, capacity_bytes: int | None) -> _Inputs:
    precision, dtype = precision_of(recipe, model.shape)
    split = recipe.embedding_sharding_dim if recipe.use_parallel_embedding else None
    parallel = Parallel(recipe.tensor_parallel, recipe.pipeline_parallel, split)
    weights.check(model.shape, precision, parallel, recipe.group_size or precision.default_group_size)
    if recipe.target == "cpu" and parallel.world_size > 1:
        raise UsageError("target cpu takes tensor_parallel 1 and pipeline_parallel 1")
    if recipe.target == "cpu" and recipe.backend == "llmapi":
        raise UsageError("backend llmapi needs a GPU target such as a100-80gb")
    gpu = None
    if recipe.target != "cpu":
        gpu = gpus.find(recipe.target)
        capacity_bytes = gpu.memory_bytes
        machine = Machine(gpu.bandwidth * parallel.tensor, gpu.dense_flops * parallel.tensor)
    if gpu and (precision.needs_fp8 or str(recipe.kv_cache) == "fp8") and not gpu.has_fp8:
        what = precision.value if precision.needs_fp8 else "a KV cache in fp8"
        raise UsageError(f"{what} needs a GPU of compute capability 8.9 or higher; {recipe.target} has "
                         f"{gpu.compute_capability}")  # fmt: skip
    held = {each.value: _held(model.shape, each, recipe) for each in (*WRITTEN, precision)}
    return _Inputs(recipe, model, precision, dtype, parallel, gpu, machine, capacity_bytes, held)


def _held(shape: ModelShape, precision: Precision, recipe: Recipe) -> WeightBytes:
    """Bytes of the undivided model as the engine multiplies with it: the CPU engine may have its head in int8.

    Of a screened head that is the screen; the 16-bit rows behind it stay in the file, and a token reads a few of them.
    """
    group_size = recipe.group_size if precision.value == recipe.precision else None
    held = model_bytes(shape, precision, group_size or precision.default_group_size)
    if recipe.target == "cpu" and _head(recipe) != "as_is":
        return replace(held, lm_head=held.lm_head // 2, small=held.small + 4 * shape.vocab_size)
    return held


def _head(recipe: Recipe) -> str:
    return cpu_execution.head_of(recipe.cpu.execution, recipe.cpu.lm_head)


def _plan(inputs: _Inputs) -> EnginePlan:
    recipe, gpu = inputs.recipe, inputs.gpu
    limits = derive(recipe, inputs.shape, recipe.limits.max_batch_size or recipe.workload.concurrency)
    needed = _memory(inputs, limits)
    notes = _notes(inputs, needed, limits)
    if gpu:
        notes += activations.warnings(inputs.dtype, inputs.model.activations)
    fitting = needed.sequences_that_fit
    if fitting is not None and recipe.limits.max_batch_size is None and fitting < limits.max_batch_size:
        limits = derive(recipe, inputs.shape, max(1, fitting))
    roofline = _roofline(inputs, limits, inputs.machine) if inputs.machine else None
    return EnginePlan(
        target=recipe.target,
        gpu=gpu,
        model=inputs.model,
        precision=inputs.precision,
        dtype=inputs.dtype,
        parallel=inputs.parallel,
        execution=None if gpu else recipe.cpu.execution,
        lm_head="as_is" if gpu else _head(recipe),
        weights=inputs.held,
        kv_element_bytes=inputs.kv_element_bytes,
        limits=limits,
        kv_cache_free_gpu_mem_fraction=memory.kv_cache_fraction(needed, limits, recipe.memory) if gpu else None,
        memory=needed,
        roofline=roofline,
        # The gateway asks tensorrt_llm for tokens, which an LLM API repository has not.
        gateway=for_rate(roofline.planned_tokens_per_s) if roofline and recipe.backend == "engine" else None,
        concurrency=recipe.workload.concurrency,
        logits_bytes=memory.logits_bytes(inputs.shape, limits, recipe.serving.max_logits_bytes) if gpu else 0,
        notes=tuple(notes),
    )


def _memory(inputs: _Inputs, limits: Limits) -> MemoryPlan:
    typical, serving = lengths(inputs.recipe.workload, inputs.shape).typical_total, inputs.recipe.serving
    if inputs.gpu is None:
        return memory.on_cpu(
            inputs.shape, inputs.held[inputs.precision.value], limits, kv_element_bytes=inputs.kv_element_bytes,
            typical_tokens=typical, capacity_bytes=inputs.capacity_bytes, screened=_head(inputs.recipe) == "screened",
            text_models=1 + serving.preprocessing_instances + serving.postprocessing_instances,
        )  # fmt: skip
    return memory.on_gpu(
        inputs.shape, inputs.precision, inputs.parallel, limits,
        typical_tokens=typical, memory=inputs.recipe.memory, capacity_bytes=inputs.gpu.memory_bytes,
        context_logits=_context_logits(inputs.recipe), group_size=inputs.group_size,
        kv_element_bytes=inputs.kv_element_bytes,
    )  # fmt: skip


def _context_logits(recipe: Recipe) -> int:
    """Bytes of one of the logits that a TensorRT engine gathers of whole prompts; 0: it does not."""
    if recipe.backend != "engine" or recipe.trtllm_build.get("gather_context_logits") is not True:
        return 0
    return 2 if recipe.trtllm_build.get("logits_dtype") == "float16" else 4


def _roofline(inputs: _Inputs, limits: Limits, machine: Machine) -> Roofline:
    """``machine`` is one pipeline stage's: on a full batch all stages work side by side, on one sequence in turn."""
    recipe, shape, batch = inputs.recipe, inputs.shape, limits.max_batch_size
    read = inputs.held[inputs.precision.value].read_per_token
    kv = weights.kv_bytes_per_token(shape, element_bytes=inputs.kv_element_bytes)
    usual = lengths(recipe.workload, shape)
    prompt, context = usual.typical_input, usual.typical_input + usual.typical_output // 2
    single = {
        name: 1 / decode_step(shape, machine, matrix_bytes=held.read_per_token, kv_bytes=kv).seconds
        for name, held in inputs.held.items()
    }
    planned = decode_step(
        shape, machine.times(inputs.parallel.pipeline),
        matrix_bytes=read, kv_bytes=kv, batch=batch, context_tokens=context,
    )  # fmt: skip
    first = prefill(shape, machine, matrix_bytes=read, prompt_tokens=prompt)
    return Roofline(
        single_tokens_per_s=single,
        context_tokens=context,
        planned_tokens_per_s=batch / planned.seconds,
        planned_bound_by=planned.bound_by,
        prompt_tokens=prompt,
        prefill_s=first.seconds,
        prefill_bound_by=first.bound_by,
        weight_only_pays_below_batch=weight_only_pays_below(
            shape, machine, bytes_16bit=model_bytes(shape, Precision.FLOAT16).read_per_token
        ),
    )


def _notes(inputs: _Inputs, needed: MemoryPlan, limits: Limits) -> list[str]:
    notes, recipe = [], inputs.recipe
    fits, wanted = needed.sequences_that_fit, recipe.limits.max_batch_size or recipe.workload.concurrency
    if fits == 0:
        notes.append(f"not one sequence of {limits.max_seq_len} tokens fits beside the weights on {recipe.target}")
    elif fits is not None and fits < wanted:
        notes.append(
            f"{wanted} sequences of {limits.max_seq_len} tokens do not fit on {recipe.target}, {fits} do; "
            "others wait in the queue"
        )
    notes += _known_troubles(recipe) if recipe.target != "cpu" else []
    if limits.max_num_tokens > MANY_NUM_TOKENS:
        notes.append(f"max_num_tokens {limits.max_num_tokens} is above {MANY_NUM_TOKENS}: trtllm-build warns about it")
    if gathered := memory.context_logits_bytes(inputs.shape, limits, _context_logits(recipe)):
        notes.append(
            f"gather_context_logits takes {human_bytes(gathered)} of the activations; a smaller limits.max_num_tokens "
            f"than {limits.max_num_tokens} takes less"
        )
    return notes


def _known_troubles(recipe: Recipe) -> list[str]:
    """What users of TensorRT-LLM reported of such an engine, and nobody here has seen."""
    notes = []
    if recipe.is_weight_only:
        notes.append(
            "the bound of prefill counts no unpacking of codes: weight-only engines lost to 16 bits on long prompts "
            "(TensorRT-LLM#2553, an A100); 'minitron accept' compares the first token after 1,024"
        )
    if recipe.precision == Precision.INT4_WEIGHT_ONLY.value and recipe.group_size is None:
        notes.append(
            "int4 with one scale a row is experimental: it was garbage for a user of an A100 (TensorRT-LLM#2735), and "
            "NVIDIA supports Nemotron in int4 with AWQ's groups only; take int4_awq, or int8 where 'minitron eval' "
            "asks for more"
        )
    if recipe.tensor_parallel * recipe.pipeline_parallel > 1:
        notes.append(
            "more than one GPU behind Triton was not tested, and is unproven upstream too (tensorrtllm_backend#577)"
        )
    return notes


def _remedies(inputs: _Inputs, fitting: int) -> list[str]:
    """Single changes to the recipe that would hold the whole workload, or where none does, more than ``fitting``."""
    recipe, wanted = inputs.recipe, inputs.recipe.workload.concurrency
    changes: list[tuple[str, dict[str, Any]]] = []
    plain = {"dtype": "auto", "group_size": None}
    if recipe.backend == "engine":
        smaller = [one.value for one in WRITTEN if one.has_channel_scales]
        changes += [(f"precision {name}", {"precision": name} | plain) for name in smaller]
    if inputs.gpu is None:
        changes.append(("cpu.execution fast", {"cpu": recipe.cpu.model_copy(update={"execution": "fast"})}))
    else:
        changes += [(f"target {other.target}", {"target": other.target}) for other in gpus.all_gpus()]
        changes += [(f"tensor_parallel {tp}", {"tensor_parallel": tp}) for tp in (2, 4, 8)]
    held = {name: _holds(inputs, recipe.model_copy(update=change)) for name, change in changes}
    found = [name for name, count in held.items() if count >= wanted]
    found = found or [f"{name} (for {count} of {wanted})" for name, count in held.items() if count > fitting]
    less = f"workload.concurrency {fitting}" if fitting else "shorter workload.input_tokens and output_tokens"
    return [*found, less]


def _holds(inputs: _Inputs, recipe: Recipe) -> int:
    """Sequences that fit with another recipe; 0 where that cannot be."""
    try:
        made = _plan(_inputs(recipe, inputs.model, inputs.machine, inputs.capacity_bytes))
        return made.memory.sequences_that_fit or 0
    except UsageError:
        return 0
