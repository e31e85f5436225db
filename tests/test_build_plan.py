"""The planner against hand calculation for Minitron-4B, and laws that hold for every shape (Hypothesis)."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, SMALL_MODEL, minitron
from minitron import data_files, recipe
from minitron.errors import ModelError, NotEnoughMemory, UsageError
from minitron.machine.gpu import all_gpus, find
from minitron.model import shape
from minitron.model.precision import ROUNDED, Precision
from minitron.model.shape import ModelShape
from minitron.recipe_model import Memory, Recipe
from minitron_build.plan import memory, model, weights
from minitron_build.plan.engine_plan import EnginePlan, plan
from minitron_build.plan.limits import Limits
from minitron_build.plan.roofline import Machine
from minitron_build.plan.weights import Parallel

MINITRON_4B = shape.from_config(data_files.load("models/minitron-4b-base.json"), "data")
PUBLISHED = model.PlannedModel("nvidia/Minitron-4B-Base", MINITRON_4B, "published sizes of minitron-4b-base")
GIGABYTE = 1e9


def planned(name: str, machine: Machine | None = None, capacity: int | None = None, **changes: Any) -> EnginePlan:
    flags = {path.replace("__", "."): value for path, value in changes.items()}
    wanted = recipe.load(name, {}, flags).recipe
    return plan(wanted, PUBLISHED, machine=machine, capacity_bytes=capacity)


# Hand calculation, from the published sizes (hidden 3072, 24 heads of 128, 8 key/value heads, intermediate 9216,
# 32 layers, vocabulary 256000):
#   a layer: qkv 5120 x 3072 = 15,728,640; dense 3072 x 3072 = 9,437,184; fc and proj 9216 x 3072 = 28,311,552 each
#   together 81,788,928; 32 layers 2,617,245,696; embedding and lm_head 256000 x 3072 = 786,432,000 each
#   bytes: 16-bit 2 x (2,617,245,696 + 1,572,864,000) = 8,380,219,392; int8 2,617,245,696 + 3,145,728,000 =
#   5,762,973,696; int4 1,308,622,848 + 3,145,728,000 = 4,454,350,848
#   KV: 2 x 32 x 8 x 128 x 2 bytes = 131,072
#   read per token (without the embedding): 6,807,355,392; 4,190,109,696; 2,881,486,848
#   2,039e9 / those = 299.5, 486.6, 707.6; 1,555e9 / those = 228.4, 371.1, 539.7


@pytest.mark.parametrize(
    ("precision", "matrices", "gigabytes"),
    [
        (Precision.FLOAT16, 8_380_219_392, 8.38),
        (Precision.BFLOAT16, 8_380_219_392, 8.38),
        (Precision.INT8_WEIGHT_ONLY, 5_762_973_696, 5.76),
        (Precision.INT4_WEIGHT_ONLY, 4_454_350_848, 4.45),
    ],
)
def test_weight_bytes_of_the_4b_model(precision: Precision, matrices: int, gigabytes: float) -> None:
    held = weights.model_bytes(MINITRON_4B, precision)
    assert held.matrices == matrices
    assert round(held.matrices / GIGABYTE, 2) == gigabytes
    assert held.embedding == held.lm_head == 1_572_864_000
    # 32 layers of two norms with bias, and a last one: 130 x 3072 x 2 bytes; rotary tables 4096 x 64 x 2 and 32 floats;
    # scales 32 x (5120 + 3072 + 9216 + 3072) x 2 bytes where the weights are codes
    assert held.small == 798_720 + 2_097_280 + (1_310_720 if precision.is_weight_only else 0)


def test_groups_carry_their_scales_and_an_int8_cache_is_half() -> None:
    """By hand: codes 1,308,622,848; a 16-bit scale for 128 of 2,617,245,696 weights is 40,894,464 bytes more."""
    held = weights.model_bytes(MINITRON_4B, Precision.INT4_AWQ, 128)
    assert held.layers == 1_308_622_848 + 40_894_464
    assert held.read_per_token == 2_922_381_312
    assert held.small == 798_720 + 2_097_280  # no scales of channels beside
    assert weights.model_bytes(MINITRON_4B, Precision.INT4_WEIGHT_ONLY, 64).layers == 1_308_622_848 + 81_788_928
    made = planned("a100-int4-awq")
    assert made.memory.weight_bytes == held.total and made.memory.kv_bytes_per_token == 131_072
    assert made.roofline is not None
    assert round(made.roofline.single_tokens_per_s["int4_awq"], 1) == 532.1  # 1,555e9 / 2,922,381,312
    eight = planned("a100-int4-awq", kv_cache="int8")
    assert eight.memory.kv_bytes_per_token == 65_536
    assert eight.memory.kv_tokens is not None and made.memory.kv_tokens is not None
    assert eight.memory.kv_tokens in (2 * made.memory.kv_tokens, 2 * made.memory.kv_tokens + 1)
    with pytest.raises(UsageError, match="group_size 640 does not divide the 3072, 1536, 4608"):
        weights.check(MINITRON_4B, Precision.INT4_AWQ, Parallel(2), 5 * 128)


def test_the_head_is_more_than_half_of_what_an_int4_token_reads() -> None:
    part = planned("a100-int4").document()["weights"]["int4_weight_only"]
    assert part["lm_head_share_of_reads"] == round(1_572_864_000 / 2_881_486_848, 4) == 0.5459
    assert part["lm_head_share_of_total"] == round(1_572_864_000 / 4_454_350_848, 4) == 0.3531


def test_kv_bytes_per_token_of_the_4b_model() -> None:
    assert weights.kv_bytes_per_token(MINITRON_4B) == 131_072
    assert weights.kv_bytes_per_token(MINITRON_4B, tp=4) == 32_768
    assert weights.kv_bytes_per_token(MINITRON_4B, tp=16) == 16_384  # 8 heads on 16 GPUs: each is there twice


@pytest.mark.parametrize(
    ("target", "rates", "stops"),
    [
        ("a100-80gb", {"float16": 299.5, "int8_weight_only": 486.6, "int4_weight_only": 707.6}, 153),
        ("a100-40gb", {"float16": 228.4, "int8_weight_only": 371.1, "int4_weight_only": 539.7}, 200),
    ],
)
def test_roofline_of_the_4b_model_at_batch_1(target: str, rates: dict[str, float], stops: int) -> None:
    best = planned("a100-float16", target=target).roofline
    assert best is not None
    assert {name: round(best.single_tokens_per_s[name], 1) for name in rates} == rates
    # peak / bandwidth x bytes per weight / 2 operations: 312e12 / 2039e9 = 153.0, 312e12 / 1555e9 = 200.6
    assert best.weight_only_pays_below_batch == stops


def test_roofline_of_a_full_batch_and_a_prompt() -> None:
    best = planned("a100-float16", workload__concurrency=32).roofline
    assert best is not None
    # 32 sequences of 512 + 256 / 2 = 640 tokens: 6,807,355,392 + 32 x 640 x 131,072 = 9,491,709,952 bytes at 2,039e9/s
    assert best.context_tokens == 640
    assert best.planned_tokens_per_s == pytest.approx(32 * 2039e9 / 9_491_709_952)
    assert best.planned_bound_by == "memory"
    # 512 tokens: 2 x 2,617,245,696 x 512 + 2 x 32 x 3072 x 512^2 + 2 x 786,432,000 operations at 312e12/s
    assert best.prefill_s == pytest.approx((2_680_059_592_704 + 51_539_607_552 + 1_572_864_000) / 312e12)
    assert best.prefill_bound_by == "arithmetic"


def test_the_gateway_workers_that_an_engine_can_feed() -> None:
    """By hand, from the table of docs/performance.md: 563 - 295 us of a worker's time a token, 267 before rounding."""
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([a-z_` ().]+) \| (\d+), \d+ \|", table, re.MULTILINE))
    assert (int(rows["gateway"]), int(rows["`tensorrt_llm` itself (`direct`)"])) == (563, 295)
    made = planned("a100-int4", workload__concurrency=16)
    assert made.roofline is not None and made.gateway is not None
    rate = made.roofline.planned_tokens_per_s
    assert 1 < rate / (1e6 / 267) < 2 and made.gateway.workers == 2
    assert made.gateway.worker_tokens_per_s == pytest.approx(1e6 / 267)
    assert made.gateway.cores == pytest.approx(rate * 562e-6)
    assert planned("a100-int4", workload__concurrency=1).gateway.workers == 1  # type: ignore[union-attr]
    assert planned("a100-llmapi").gateway is None  # it has no tensorrt_llm that takes tokens
    assert planned("cpu").gateway is None  # of a machine that is not known
    slow = planned("cpu", machine=Machine(bandwidth=20e9, flops=None), capacity=32 << 30)
    assert slow.gateway is not None and slow.gateway.workers == 1
    assert "gateway" not in made.identity()


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    changes: dict[str, Any] = {
        "workload__concurrency": 512,
        "workload__input_tokens": 16,
        "workload__output_tokens": 16,
    }
    best = planned("a100-int8", None, None, **changes).roofline
    assert best is not None
    assert best.planned_bound_by == "arithmetic"


def test_limits_of_the_shipped_int8_recipe() -> None:
    made = planned("a100-int8")
    assert made.limits == Limits(32, max_input_len=1024, max_seq_len=2048, max_num_tokens=8192)
    assert made.logits_bytes == 0
    offered = recipe.load("a100-int8", {}, {"serving.max_logits_bytes": 1024 * 256_000 * 4}).recipe
    assert (
        plan(offered, model.look_up(offered.model)).logits_bytes == 33_554_432_000
    )  # 32 streams of 1,024 tokens: 33.6 GB
    # activations: 8192 tokens x (6144 + 5120 + 3072 + 18432) x 2 bytes + 32 x 256000 x 8, and 30 %
    assert made.memory.activation_bytes == -(-(8192 * 32768 * 2 + 65_536_000) * 13 // 10)
    free = 85_198_897_152 - 5_767_180_416 - made.memory.activation_bytes - (1 << 30)
    assert made.memory.free_bytes == free
    # 32 x 2048 tokens of 131,072 bytes are 8.6 GB of 77.6
    assert made.kv_cache_free_gpu_mem_fraction == 0.12
    assert made.memory.sequences_that_fit == int(free * 0.9) // 131_072 // 2048 == 260


@pytest.mark.parametrize(
    ("flags", "size"), [({}, 2 * 8192 * 256_000 * 4), ({"logits_dtype": "float16"}, 2 * 8192 * 256_000 * 2)]
)
def test_logits_of_whole_prompts_are_planned_for(flags: dict[str, Any], size: int) -> None:
    """Two of max_num_tokens rows: TensorRT-LLM makes a step's while the last one's are there (runtimeBuffers.cpp)."""
    plain = planned("a100-int8")
    made = planned("a100-int8", trtllm_build={"gather_context_logits": True, **flags})
    assert made.memory.activation_bytes == plain.memory.activation_bytes + size
    assert plain.memory.free_bytes is not None and made.memory.free_bytes == plain.memory.free_bytes - size
    said = ["gather_context_logits takes" in " ".join(each.notes) for each in (plain, made)]
    assert said == [False, True]


def test_limits_that_the_recipe_sets_are_kept() -> None:
    made = planned("a100-int8", limits__max_batch_size=7, limits__max_num_tokens=1024, memory__kv_cache_fraction=0.5)
    assert (made.limits.max_batch_size, made.limits.max_num_tokens) == (7, 1024)
    assert made.kv_cache_free_gpu_mem_fraction == 0.5


def test_num_tokens_hold_the_longest_prompt_beside_a_full_batch() -> None:
    long = replace(PUBLISHED, shape=replace(MINITRON_4B, max_positions=32768))
    flags = {"workload.input_tokens": 20000, "workload.output_tokens": 100, "workload.concurrency": 4}
    made = plan(recipe.load("a100-int8", {}, flags).recipe, long)
    assert made.limits.max_num_tokens == 20032  # 20,004 in whole blocks of 32
    assert any("above 16384" in note for note in made.notes)


def test_what_does_not_fit_is_said_with_what_would() -> None:
    made = planned("a100-float16", target="a100-40gb", workload__concurrency=200)
    assert made.limits.max_batch_size == made.memory.sequences_that_fit
    assert made.limits.max_batch_size < 200
    assert "200 sequences of 2048 tokens do not fit on a100-40gb" in made.notes[0]
    assert "target a100-80gb" in made.remedies
    assert "tensor_parallel 2" in made.remedies
    assert f"workload.concurrency {made.limits.max_batch_size}" in made.remedies
    for remedy in made.remedies:
        path, value = remedy.split()
        changes: dict[str, Any] = {"target": "a100-40gb", "workload__concurrency": 200} | {
            path.replace(".", "__"): value
        }
        again = planned("a100-float16", **changes)
        assert (again.memory.sequences_that_fit or 0) >= again.concurrency


def test_a_model_larger_than_the_gpu_does_not_fit() -> None:
    large = replace(PUBLISHED, shape=replace(MINITRON_4B, num_layers=320))
    flags = {"target": "a100-40gb", "workload.concurrency": 1}
    made = plan(recipe.load("a100-float16", {}, flags).recipe, large)
    assert not made.fits
    assert "not one sequence" in made.notes[0]
    assert "precision int4_weight_only" in made.remedies
    assert "target a100-80gb" in made.remedies
    many = plan(recipe.load("a100-float16", {}, flags | {"workload.concurrency": 2000}).recipe, large)
    assert any(remedy.startswith("target a100-80gb (for ") for remedy in many.remedies)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel": 5}, "try 1, 2, 4, 8"),
        ({"tensor_parallel": 2, "target": "cpu"}, "target cpu takes tensor_parallel 1"),
        ({"backend": "llmapi", "precision": "float16", "dtype": "auto", "target": "cpu"}, "needs a GPU target"),
        ({"pipeline_parallel": 33}, "more than the 32 layers"),
        ({"workload__output_tokens": 3073}, "more than the 4096 positions"),
        ({"limits__max_seq_len": 512}, "max_input_len 1024 is more than max_seq_len 512"),
        ({"limits__max_batch_size": 64, "limits__max_num_tokens": 32}, "less than max_batch_size 64"),
        ({"target": "a100-81gb"}, "it may be cpu, a100-40gb"),
        ({"model__published_shape": "minitron-5b"}, "minitron-4b-base"),
    ],
)
def test_recipes_that_contradict_the_model_are_refused(changes: dict[str, Any], said: str) -> None:
    flags = {path.replace("__", "."): value for path, value in changes.items()}
    wanted = recipe.load("a100-int8", {}, flags).recipe
    with pytest.raises(UsageError, match=said):
        plan(wanted, model.look_up(wanted.model))


def test_weight_only_needs_multiples_of_64() -> None:
    odd = replace(PUBLISHED, shape=replace(MINITRON_4B, intermediate_size=9216 + 32))
    with pytest.raises(UsageError, match="multiples of 64"):
        plan(recipe.load("a100-int8", {}).recipe, odd)
    assert plan(recipe.load("a100-float16", {}).recipe, odd).fits


def test_cpu_memory_agrees_with_what_was_measured() -> None:
    """Total resident GB of the bare pipeline with the 4B shape as measured with openvino 2026.4.1 and AVX-512 (a small
    cache is in it too)."""
    measured = [
        ("int8_weight_only", "as_is", 8.9), ("int8_weight_only", "int8", 7.4), ("int4_weight_only", "as_is", 6.4),
        ("int4_weight_only", "int8", 4.8), ("bfloat16", "as_is", 14.0),
    ]  # fmt: skip
    for precision, head, resident in measured:
        peak = planned("cpu", capacity=24 << 30, precision=precision, cpu__lm_head=head).memory.cpu_peak
        assert peak is not None
        assert (peak.loading - peak.text - peak.server) / GIGABYTE == pytest.approx(resident, rel=0.1)


@pytest.mark.parametrize(
    ("name", "tokenizers"),
    [("cpu-4b", 3), ("cpu-4b-int8", 3), ("cpu-4b-repeating", 3), ("cpu-4b-avx2", 1), ("cpu-4b-avx2-int8", 1)],
)
def test_private_memory_agrees_with_what_bench_cpu_measured(name: str, tokenizers: int) -> None:
    """Of servers of the full 4B shape, with AVX-512 and with AVX2 alone (benches/results, private memory of all
    processes). In the older runs three models had a tokenizer from the start, since then the text model alone."""
    found = json.loads((ROOT / "benches" / "results" / f"{name}.json").read_text())
    for row in found["rows"]:
        made = planned(
            "cpu", capacity=24 << 30, precision=row["precision"], cpu__execution=row["execution"],
            cpu__lm_head=row["head"], limits__max_batch_size=max(found["streams"]),
        )  # fmt: skip
        peak = made.memory.cpu_peak
        assert peak is not None
        # Its KV cache was of another size, and its tokenizer of 6,460,992 bytes.
        cache, text = row["private_expected_bytes"]["kv_cache"], 3 * 20_000_000 + tokenizers * 16 * 6_460_992
        known = replace(peak, kv_cache=cache, text=text, ensemble=0)
        assert known.private == pytest.approx(row["memory_bytes"]["server"]["private"], rel=0.1)


def test_cpu_kv_cache_and_bandwidth_bound() -> None:
    made = planned("cpu", machine=Machine(30e9, None), capacity=24 << 30)
    assert made.memory.kv_bytes_per_token == 262_144  # float32: twice the 131,072 of 16 bits
    assert made.roofline is not None
    assert made.roofline.single_tokens_per_s["int8_weight_only"] == pytest.approx(30e9 / 4_190_109_696)
    assert made.roofline.weight_only_pays_below_batch is None
    assert planned("cpu", cpu__execution="fast").memory.kv_bytes_per_token == 76_000
    assert made.kv_cache_free_gpu_mem_fraction is None


def test_a_cpu_plan_without_the_machine_is_the_same_everywhere() -> None:
    assert planned("cpu").memory.sequences_that_fit is None
    assert planned("cpu").roofline is None
    assert planned("cpu").limits == planned("cpu", machine=Machine(1e9, None), capacity=24 << 30).limits


# --- the model's own config.json


def test_a_config_at_hand_wins_and_each_difference_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = data_files.load("models/minitron-4b-base.json") | {"num_hidden_layers": 30, "vocab_size": 256128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = recipe.load("a100-int8", {}, {"model.source": str(tmp_path)}).recipe
    with caplog.at_level(logging.WARNING):
        found = model.look_up(wanted.model)
    assert (found.shape.num_layers, found.shape.vocab_size) == (30, 256128)
    assert found.shape_from == str(tmp_path / "config.json")
    assert "num_layers 30 (published 32)" in caplog.text
    assert "vocab_size 256128 (published 256000)" in caplog.text
    assert "hidden_size" not in caplog.text


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is not there"):
        model.look_up(recipe.load("cpu", {}, {"model.source": str(tmp_path)}).recipe.model)
    with pytest.raises(ModelError, match="neither a folder"):
        model.look_up(recipe.load("cpu", {}, {"model.source": str(tmp_path / "gone")}).recipe.model)


@pytest.mark.parametrize(
    ("own", "precision", "dtype", "resolved"),
    [
        ("bfloat16", "auto", "auto", ("bfloat16", "bfloat16")),
        ("float32", "auto", "auto", ("float16", "float16")),
        (None, "auto", "auto", ("float16", "float16")),
        ("bfloat16", "int8_weight_only", "auto", ("int8_weight_only", "bfloat16")),
        ("bfloat16", "int4_weight_only", "float16", ("int4_weight_only", "float16")),
        ("bfloat16", "float16", "auto", ("float16", "float16")),
        ("bfloat16", "auto", "float16", ("float16", "float16")),
    ],
)
def test_auto_follows_the_model(own: str | None, precision: Any, dtype: Any, resolved: tuple[str, str]) -> None:
    found = model.precision_of(Recipe(precision=precision, dtype=dtype), replace(MINITRON_4B, dtype=own))
    assert (found[0].value, found[1]) == resolved


# --- laws


shapes = st.builds(
    lambda kv, group, size, layers, wide, vocab: replace(
        MINITRON_4B, num_kv_heads=kv, num_heads=kv * group, hidden_size=kv * group * size, num_layers=layers,
        intermediate_size=wide * 256, vocab_size=vocab,
    ),
    kv=st.sampled_from([2, 4, 8]), group=st.integers(1, 4), size=st.sampled_from([64, 128]),
    layers=st.integers(1, 64), wide=st.integers(1, 64), vocab=st.integers(100, 300_000),
)  # fmt: skip
precisions = st.sampled_from(ROUNDED)


@given(shapes)
def test_fewer_bits_are_fewer_bytes(some: ModelShape) -> None:
    held = [weights.model_bytes(some, precision) for precision in ROUNDED]
    wide, _, int8, int4 = (part.layers for part in held)
    assert wide == 2 * int8 == 4 * int4
    assert held[0] == held[1]
    assert held[1].total > held[2].total > held[3].total


@given(shapes, precisions, st.sampled_from([1, 2]))
def test_tensor_parallelism_splits_exactly(some: ModelShape, precision: Precision, tp: int) -> None:
    whole, part = weights.model_bytes(some, precision), weights.stage_bytes(some, precision, Parallel(tp), 0)
    assert part.layers * tp == whole.layers
    assert 0 <= part.lm_head * tp - whole.lm_head < tp * some.hidden_size * 2  # padding of less than tp rows
    assert part.embedding == whole.embedding
    assert weights.kv_bytes_per_token(some, tp) * tp == weights.kv_bytes_per_token(some)


@given(shapes, precisions, st.integers(1, 8))
def test_pipeline_stages_add_up(some: ModelShape, precision: Precision, pp: int) -> None:
    stages = [weights.stage_bytes(some, precision, Parallel(1, pp), stage) for stage in range(pp)]
    whole = weights.model_bytes(some, precision)
    for part in ("embedding", "layers", "lm_head"):
        assert sum(getattr(stage, part) for stage in stages) == getattr(whole, part)


@given(shapes, st.sampled_from([0, 1]))
def test_a_split_embedding_is_shared_out(some: ModelShape, dim: int) -> None:
    part = weights.stage_bytes(some, Precision.FLOAT16, Parallel(2, 1, dim), 0)
    whole = weights.model_bytes(some, Precision.FLOAT16).embedding
    assert 0 <= 2 * part.embedding - whole <= 2 * some.hidden_size


@settings(max_examples=50, deadline=None)
@given(shapes, precisions, st.integers(1, 200), st.integers(0, 100 << 30), st.integers(0, 100 << 30))
def test_more_memory_never_fits_fewer_sequences(
    some: ModelShape, precision: Precision, batch: int, less: int, more: int
) -> None:
    limits = Limits(batch, 512, 1024, 8192)
    fits = [
        memory.on_gpu(
            some, precision, Parallel(), limits, typical_tokens=300, memory=Memory(), capacity_bytes=capacity
        ).sequences_that_fit
        for capacity in sorted((less, more))
    ]
    assert fits[0] is not None
    assert fits[1] is not None
    assert fits[0] <= fits[1]


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(1, 300))
def test_a_planned_batch_fits_its_share_of_the_memory(some: ModelShape, concurrency: int) -> None:
    flags = {"workload.concurrency": concurrency}
    made = plan(recipe.load("a100-float16", {}, flags).recipe, replace(PUBLISHED, shape=some))
    if made.fits and made.kv_cache_free_gpu_mem_fraction and made.memory.free_bytes:
        pool = made.kv_cache_free_gpu_mem_fraction * made.memory.free_bytes
        needed = made.limits.max_batch_size * made.limits.tokens_per_sequence * made.memory.kv_bytes_per_token
        assert needed <= pool * (1 + 1e-9)


# --- the command


@pytest.mark.parametrize("name", recipe.shipped())
def test_plan_of_every_recipe_needs_neither_gpu_nor_model(name: str) -> None:
    document = json.loads(minitron("plan", "--recipe", name, "--bandwidth", "30", "--json").stdout)
    assert document["fits"] is True
    assert document["model"]["shape_from"] == "published sizes of minitron-4b-base"


def test_plan_prints_tables() -> None:
    text = minitron("plan", "--recipe", "a100-int4").stdout
    assert "sizes from published sizes of minitron-4b-base" in text
    for number in ("8.38 GB", "5.76 GB", "4.45 GB", "131,072 B", "228.4 tokens/s", "371.1 tokens/s", "539.7 tokens/s"):
        assert number in text
    assert "From batch 200 on" in text


def test_plan_fails_where_nothing_fits(tmp_path: Path) -> None:
    words = ("plan", "--recipe", "a100-float16", "--target", "a100-40gb", "--json")
    done = minitron(*words, check=False)
    assert done.returncode == 0
    config = data_files.load("models/minitron-4b-base.json") | {"num_hidden_layers": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = minitron(*words, "--model", tmp_path, check=False)
    assert done.returncode == NotEnoughMemory.exit_code
    assert json.loads(done.stdout)["fits"] is False
    assert "what would: tensor_parallel 4; or tensor_parallel 8" in done.stderr


def test_every_gpu_names_its_source() -> None:
    for gpu in all_gpus():
        assert gpu.source
        assert gpu.architecture == "sm" + gpu.compute_capability.replace(".", "")


def test_the_plan_counts_what_convert_writes(small_checkpoint: Any) -> None:
    """Bytes of all tensors in real checkpoints of the small model, summed from their safetensors headers."""
    own = shape.read(SMALL_MODEL / "config.json")
    for precision in ROUNDED:
        raw = (small_checkpoint(precision.value) / "rank0.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        held = sum(entry["data_offsets"][1] - entry["data_offsets"][0]
                   for name, entry in header.items() if name != "__metadata__")  # fmt: skip
        assert weights.model_bytes(own, precision).total == held


def test_other_gpus_and_slices_are_targets() -> None:
    """Memory and bandwidth by their sources in gpus.yaml; a slice has its share of the board's."""
    whole, half = find("a100-80gb"), find("a100-80gb-3g.40gb")
    assert half.memory_bytes == int(39.25 * (1 << 30)) and half.bandwidth == whole.bandwidth / 2
    assert half.dense_flops == pytest.approx(whole.dense_flops * 42 / 108)
    layouts = {target: find(target).code_layout for target in ("a100-40gb", "l40s-48gb", "rtx4090-24gb")}
    assert set(layouts.values()) == {"sm80"}
    assert {find(target).code_layout for target in ("h100-80gb", "h200-141gb")} == {"sm90"}
    assert "a100-80gb-3g.40gb" not in {each.target for each in all_gpus()}  # no remedy buys a slice
    made = planned("a100-bfloat16", target="a100-80gb-1g.10gb")
    assert made.memory.capacity_bytes == int(9.5 * (1 << 30)) and made.remedies
