"""A plan as text for people: what was assumed, what fits, what was decided, and how fast it could be at best."""

from __future__ import annotations

from minitron import console
from minitron.console import human_bytes
from minitron.model.precision import WRITTEN, Precision
from minitron_build.plan.engine_plan import EnginePlan, Roofline
from minitron_build.plan.gateway import GatewayPlan
from minitron_build.plan.weights import WeightBytes


def _lines(plan: EnginePlan) -> dict[str, str]:
    """Precisions to show, and what to call them; the two 16-bit types weigh the same and share a line."""
    shown = dict.fromkeys((*WRITTEN, plan.precision))
    return {one.value: one.shown for one in shown if one is not Precision.BFLOAT16}


def text(plan: EnginePlan) -> str:
    """Several tables, one below the other."""
    parts = [_head(plan), _weights(plan), _memory(plan), _limits(plan)]
    if plan.roofline:
        parts.append(_roofline(plan, plan.roofline))
    if plan.gateway:
        parts.append(_gateway(plan.gateway))
    if plan.notes:
        parts.append("\n".join(f"NOTE: {note}" for note in plan.notes))
    if plan.remedies:
        parts.append("What would hold the whole workload: " + "; or ".join(plan.remedies))
    return "\n\n".join(parts)


def _head(plan: EnginePlan) -> str:
    where = f"{plan.gpu.name}, {plan.gpu.architecture}" if plan.gpu else "this machine's CPU"
    world = plan.parallel.world_size
    return (
        f"{plan.model.source}: sizes from {plan.model.shape_from}\n"
        f"{plan.precision.value}, activations in {plan.dtype}, on {world} x {plan.target} ({where})"
    )


def _weights(plan: EnginePlan) -> str:
    rows = []
    for name, title in _lines(plan).items():
        held: WeightBytes = plan.weights[name]
        mark = " <" if plan.precision.shown == title else ""
        parts = (held.embedding, held.layers, held.lm_head, held.small)
        rows.append([
            title + mark,
            *(human_bytes(part) for part in parts),
            human_bytes(held.matrices),
            f"{held.lm_head / held.matrices:.0%}",
            human_bytes(held.read_per_token),
            f"{held.lm_head / held.read_per_token:.0%}",
        ])  # fmt: skip
    head = ("weights", "embedding", "layers", "lm_head", "scales, norms, tables", "matrices", "lm_head's share",
            "read per token", "lm_head's share")  # fmt: skip
    return console.table(rows, head)


def _memory(plan: EnginePlan) -> str:
    need = plan.memory
    longest = plan.limits.max_seq_len
    rows = [("KV cache per token", f"{need.kv_bytes_per_token:,} B")]
    if need.capacity_bytes is not None and need.free_bytes is not None:
        rows.insert(0, ("memory", human_bytes(need.capacity_bytes)))
        rows += [
            ("weights" if plan.gpu else "weights as executed", human_bytes(need.weight_bytes)),
            (
                "activations (estimate, margin included)" if plan.gpu else "buffers of a step",
                human_bytes(need.activation_bytes),
            ),
            (
                "runtime and workspace (estimate)" if plan.gpu else "processes of the server",
                human_bytes(need.runtime_bytes),
            ),
            ("left for the KV cache", human_bytes(need.free_bytes)),
            ("KV cache tokens that fit", f"{need.kv_tokens:,}"),
            (f"sequences of {longest} tokens that fit", f"{need.sequences_that_fit:,}"),
            ("sequences of median length that fit", f"{need.typical_sequences_that_fit:,}"),
        ]
    if peak := need.cpu_peak:
        cache = human_bytes(peak.kv_cache)
        rows += [
            (f"private memory with {cache} of KV cache", human_bytes(peak.private)),
            ("peak: that, or while it loads with the weights' file", human_bytes(peak.total)),
        ]
    if plan.logits_bytes:
        rows.append(("logits that a full batch may ask for (host memory)", human_bytes(plan.logits_bytes)))
    return console.table(rows, ("fullest GPU" if plan.gpu else "this machine", ""))


def _limits(plan: EnginePlan) -> str:
    limits = plan.limits
    rows = [
        ("max_batch_size", f"{limits.max_batch_size:,}", f"of {plan.concurrency} sequences wanted at the same time"),
        ("max_input_len", f"{limits.max_input_len:,}", "longest prompt"),
        ("max_seq_len", f"{limits.max_seq_len:,}", "longest prompt and output"),
        ("max_num_tokens", f"{limits.max_num_tokens:,}", "of all sequences in one step"),
    ]
    if plan.kv_cache_free_gpu_mem_fraction is not None:
        share = f"{plan.kv_cache_free_gpu_mem_fraction:.2f}"
        rows.append(("kv_cache_free_gpu_mem_fraction", share, "of what is free once the engine is loaded"))
    return console.table(rows, ("limit", "value", "meaning"))


def _gateway(front: GatewayPlan) -> str:
    workers = "one gateway worker" if front.workers == 1 else f"{front.workers} gateway workers"
    return (
        f"At that batch it can feed {workers} ('minitron gateway --workers'): one carries "
        f"{front.worker_tokens_per_s:,.0f} tokens/s, and with Triton they keep {front.cores:.1f} cores busy. "
        f"Measured: {front.source}"
    )


def _roofline(plan: EnginePlan, best: Roofline) -> str:
    batch = plan.limits.max_batch_size
    unpacking = ", unpacking not counted" if plan.precision.is_weight_only else ""
    rows = [
        (f"decode, batch 1, {title}", f"{best.single_tokens_per_s[name]:,.1f} tokens/s", "memory")
        for name, title in _lines(plan).items()
    ]
    rows += [
        (f"decode, batch {batch}, {best.context_tokens} tokens each, {plan.precision.value}",
         f"{best.planned_tokens_per_s:,.1f} tokens/s", best.planned_bound_by),
        (f"prefill of {best.prompt_tokens} tokens{unpacking}",
         f"{best.prefill_s * 1000:,.1f} ms", best.prefill_bound_by),
    ]  # fmt: skip
    lines = [console.table(rows, ("no faster than", "", "bound by"))]
    if plan.gpu is None:
        lines.append("The arithmetic peak of this CPU is not known, so only reading is counted.")
    if best.weight_only_pays_below_batch is not None:
        lines.append(
            f"From batch {best.weight_only_pays_below_batch} on 16-bit weights are bound by arithmetic too, and int8 "
            "or int4 cannot be faster; real kernels lose their gain earlier."
        )
    return "\n".join(lines)
