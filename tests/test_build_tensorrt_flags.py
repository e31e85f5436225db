"""The command line that trtllm-build is given, and what an engine is compared with.

Expected command lines are the hand-written ones of data/trtllm_build, expected flags those of TensorRT-LLM 1.2.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA
from doubles import trtllm_build as double
from minitron import recipe
from minitron.errors import ToolError, UsageError
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.engines.tensorrt import check, flags
from minitron_build.plan import engine_plan, model

pytestmark = pytest.mark.slow

GOLDEN = {
    "a100-float16": ("a100-float16", {}),
    "a100-bfloat16": ("a100-bfloat16", {}),
    "a100-int8": ("a100-int8", {}),
    "a100-int4": ("a100-int4", {}),
    "a100-int8-tp2": ("a100-int8", {"tensor_parallel": 2}),
}


def golden(name: str) -> list[str]:
    lines = (DATA / "trtllm_build" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"--\w+ \S+ +# \S.*", line) for line in lines), "one flag, its value and why, on each line"
    return ["trtllm-build", *(word for line in lines for word in line.split(" #")[0].split())]


def planned(name: str, flags: dict[str, Any] | None = None) -> engine_plan.EnginePlan:
    wanted = recipe.load(name, {}, flags).recipe
    return engine_plan.plan(wanted, model.look_up(wanted.model))


def arguments(plan: engine_plan.EnginePlan, **more: Any) -> dict[str, Any]:
    return flags.arguments(plan, "CHECKPOINT", "ENGINE", output_timing_cache="ENGINE/.timing.cache", more=more)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_plan_of_each_recipe_becomes_its_golden_command_line(name: str) -> None:
    assert flags.argv(arguments(planned(*GOLDEN[name]))) == golden(name)


# Defaults as TensorRT-LLM 1.2 has them (tensorrt_llm/commands/build.py, plugin/plugin.py, builder.py).
DEFAULTS = {
    "checkpoint_dir": None, "output_dir": "engine_outputs", "model_config": None, "build_config": None,
    "max_batch_size": 2048, "max_input_len": 1024, "max_seq_len": None, "max_num_tokens": 8192, "opt_num_tokens": None,
    "max_beam_width": 1, "kv_cache_type": None, "max_prompt_embedding_table_size": 0, "workers": 1,
    "weight_streaming": False, "strip_plan": False, "weight_sparsity": False, "enable_debug_output": False,
    "dry_run": False, "monitor_memory": False, "fast_build": False, "input_timing_cache": None,
    "output_timing_cache": "model.cache", "profiling_verbosity": "layer_names_only", "visualize_network": None,
    "log_level": "info", "logits_dtype": None, "gather_context_logits": False, "gather_generation_logits": False,
    "gather_all_token_logits": False, "lora_dir": None, "lora_target_modules": None, "max_lora_rank": 64,
    "speculative_decoding_mode": None, "max_draft_len": 0, "gpt_attention_plugin": "auto", "gemm_plugin": None,
    "remove_input_padding": "enable", "context_fmha": "enable", "use_paged_context_fmha": "enable",
    "use_fp8_context_fmha": "enable", "tokens_per_block": 32, "multiple_profiles": "disable",
    "reduce_fusion": "disable", "user_buffer": "disable", "norm_quant_fusion": "disable", "use_fused_mlp": "enable",
    "nccl_plugin": "auto", "bert_attention_plugin": "auto", "moe_plugin": "auto", "mamba_conv1d_plugin": "auto",
    "lora_plugin": None, "dora_plugin": "disable", "gemm_swiglu_plugin": None, "fp8_rowwise_gemm_plugin": None,
    "low_latency_gemm_plugin": None, "low_latency_gemm_swiglu_plugin": None, "gemm_allreduce_plugin": None,
    "fuse_fp4_quant": "disable", "streamingllm": "disable", "pp_reduce_scatter": "disable",
    "bert_context_fmha_fp32_acc": "disable", "paged_state": "enable",
}  # fmt: skip


def test_the_data_file_has_every_flag_with_its_default() -> None:
    known = flags.flags()
    assert {name: known[name].default for name in DEFAULTS} == DEFAULTS
    assert known["max_seq_len"].alias == "max_decoder_seq_len"
    assert set(known["gemm_plugin"].choices) == {
        "auto", "float16", "bfloat16", "float32", "int32", "disable", "fp8", "nvfp4",
    }  # fmt: skip
    assert known["kv_cache_type"].choices == ("continuous", "paged", "disabled")


def other_value(flag: flags.Flag, now: Any) -> Any:
    """A value that a flag could have instead of ``now``."""
    if flag.type == "int":
        return (now or 0) + 1
    if flag.type == "switch":
        return True
    if flag.type == "text":
        return "elsewhere"
    return next(choice for choice in flag.choices if choice != now)


@pytest.mark.parametrize("name", sorted(flags.flags()))
def test_flipping_any_flag_is_noticed(name: str) -> None:
    """In a recipe: a rule refuses it, or the command line is no longer the golden one."""
    flag = flags.flags()[name]
    value = other_value(flag, arguments(planned("a100-int8")).get(name, flag.default))
    if flag.use == "recipe":
        assert flags.argv(arguments(planned("a100-int8"), **{name: value})) != golden("a100-int8")
        return
    with pytest.raises(UsageError, match=rf"trtllm_build\.{name}: "):
        arguments(planned("a100-int8"), **{name: value})


#: Flags whose value another one would still be a good build: where things are, and how many ranks at a time.
ELSEWHERE = {"checkpoint_dir", "output_dir", "output_timing_cache", "workers"}


@pytest.mark.parametrize("name", sorted(set(arguments(planned("a100-int8"))) - ELSEWHERE))
def test_an_engine_built_with_another_value_is_refused(
    name: str, small_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind our back: the flag that reaches trtllm-build differs from the one that was decided."""
    monkeypatch.chdir(tmp_path)
    checkpoint = small_checkpoint("int8_weight_only")
    asked = arguments(planned("a100-int8")) | {
        "checkpoint_dir": str(checkpoint), "output_dir": str(tmp_path / "engine"), "output_timing_cache": "timing",
    }  # fmt: skip
    told = asked | {name: other_value(flags.flags()[name], asked[name])}
    monkeypatch.setattr(sys, "argv", flags.argv(told))
    double.main()
    with Checkpoint.open(checkpoint) as source, pytest.raises(ToolError, match=name):
        check.check(tmp_path / "engine", source, asked, "1.2.1")


@pytest.mark.parametrize(
    "words",
    [
        ["--max_batch_sise", "3"],
        ["--max_batch_size", "many"],
        ["--max_batch_size", "0"],
        ["--kv_cache_type", "infinite"],
        ["--gemm_plugin", "int5"],
        ["--use_paged_context_fmha", "auto"],
        ["--max_batch", "3"],
    ],
)
def test_the_double_rejects_what_argparse_would(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trtllm-build", *words])
    with pytest.raises(SystemExit) as refused:
        double.main()
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_batch_size": 3}, "the plan sets"),
        ({"max_batch_sise": 3}, "has no flag"),
        ({"opt_num_tokens": 0}, "1 is the least"),
        ({"opt_num_tokens": "all"}, "a whole number"),
        ({"monitor_memory": "yes"}, "true or false"),
        ({"profiling_verbosity": "loud"}, "layer_names_only, detailed, none"),
        ({"streamingllm": "enable"}, "refuses it for Nemotron"),
    ],
)
def test_wrong_flags_in_a_recipe_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        arguments(planned("a100-int8"), **flags)
