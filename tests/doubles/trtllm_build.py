"""A stand-in for trtllm-build 1.2: the same command line, the same checks of its input, the same engine folder.

It imports nothing of the toolkit. The command line comes from the data file alone; what it does with a checkpoint and
what it writes follow the contract of trtllm-build (TensorRT-LLM tensorrt_llm/commands/build.py, builder.py,
models/modeling_utils.py). TRTLLM_BUILD_DOUBLE tells it to go wrong, TRTLLM_BUILD_DOUBLE_GPUS how many GPUs there are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[2] / "build" / "minitron_build" / "engines" / "tensorrt" / "trtllm_build.yaml"
VERSION = os.environ.get("TRTLLM_BUILD_DOUBLE_VERSION", "1.2.1")
#: What the help is to say otherwise: "without:NAME", "default:NAME=VALUE" or "choices:NAME=A,B".
HELP = os.environ.get("TRTLLM_BUILD_DOUBLE_HELP", "")
#: Flags whose default the help does not show (argparse.SUPPRESS in commands/build.py).
SUPPRESSED = ("kv_cache_type", "paged_kv_cache")
KEYWORDS = {
    "mapping": {"world_size", "tp_size", "pp_size"},
    "quantization": {
        "quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "exclude_modules",
    },
}  # fmt: skip


def parser(data: dict[str, Any]) -> argparse.ArgumentParser:
    how = argparse.ArgumentDefaultsHelpFormatter
    made = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False, formatter_class=how)
    for section in ("flags", "plugins"):
        for name, entry in data[section].items():
            if f"without:{name}" == HELP:
                continue
            options = [f"--{name}"] + ([f"--{entry['alias']}"] if "alias" in entry else [])
            kind = entry["type"]
            about = f"What {name} is for, in many words that would be broken over lines."
            if kind == "switch":
                made.add_argument(*options, dest=name, action="store_true", help=about)
                continue
            default = entry["default"]
            if HELP.startswith(f"default:{name}="):
                default = HELP.partition("=")[2]
            if "--help" in sys.argv and name in SUPPRESSED:
                default = argparse.SUPPRESS
            choices = {"choice": entry.get("choices"), "onoff": ["enable", "disable"],
                       "dtype": [*data["dtypes"], *entry.get("also", [])]}.get(kind)  # fmt: skip
            if HELP.startswith(f"choices:{name}="):
                choices = HELP.partition("=")[2].split(",")
            parse = at_least(entry.get("min")) if kind == "int" else str
            many = "+" if entry.get("many") else None
            made.add_argument(*options, dest=name, default=default, choices=choices, nargs=many, type=parse, help=about)
    return made


def at_least(least: int | None) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    loaded: dict[str, Any] = json.loads(raw[8 : 8 + size])
    loaded.pop("__metadata__", None)
    return loaded


def expected_tensors(config: dict[str, Any], rank: int, codes: bool) -> dict[str, tuple[int, ...] | None]:
    """Names and shapes of one rank, as the GPT model of variant nemotron has them (None: any shape)."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    stage = rank // tp
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"] // tp, config["num_attention_heads"]
    qkv = (heads // tp + 2 * max(1, config["num_key_value_heads"] // tp)) * (hidden // heads)
    linear = {"attention.qkv": (qkv, hidden), "attention.dense": (hidden, hidden // tp),
              "mlp.fc": (inner, hidden), "mlp.proj": (hidden, inner)}  # fmt: skip
    packed = 1 if config["quantization"]["quant_algo"] == "W8A16" else 2
    each, more = divmod(config["num_hidden_layers"], pp)
    expected: dict[str, tuple[int, ...] | None] = {}
    for layer in range(each + (stage < more)):
        start = f"transformer.layers.{layer}"
        for name, (rows, columns) in linear.items():
            if config["quantization"]["quant_algo"] == "W4A16_AWQ":
                group = config["quantization"]["group_size"]
                expected[f"{start}.{name}.weight"] = (rows // 2, columns)
                expected[f"{start}.{name}.weights_scaling_factor"] = (rows, columns // group)
                if config["quantization"]["pre_quant_scale"]:
                    expected[f"{start}.{name}.prequant_scaling_factor"] = (columns,)
                continue
            expected[f"{start}.{name}.weight"] = (columns, rows // packed) if codes else (rows, columns)
            if codes:
                expected[f"{start}.{name}.per_channel_scale"] = (rows,)
        if config["quantization"]["kv_cache_quant_algo"]:
            expected[f"{start}.attention.kv_cache_scaling_factor"] = (1,)
        for norm in ("input_layernorm", "post_layernorm"):
            expected |= {f"{start}.{norm}.weight": (hidden,), f"{start}.{norm}.bias": (hidden,)}
    if stage == 0:
        expected["transformer.vocab_embedding.weight"] = None
    if stage == pp - 1:
        expected |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
        expected["lm_head.weight"] = (-(-config["vocab_size"] // tp), hidden)
    return expected


def check_rank(config: dict[str, Any], rank: int, tensors: dict[str, Any]) -> None:
    codes = any(entry["dtype"] == "I8" for entry in tensors.values())
    if codes and not config["quantization"]["quant_algo"]:
        raise SystemExit("RuntimeError: int8 tensors without a quant_algo")
    expected = expected_tensors(config, rank, codes)
    for name, shape in expected.items():
        if name not in tensors:
            raise SystemExit(f"RuntimeError: Required but not provided tensors:{{'{name}'}}")
        if shape is not None and tuple(tensors[name]["shape"]) != shape:
            raise SystemExit(f"ValueError: {name} has shape {tensors[name]['shape']}, expected {list(shape)}")
    optional = {"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"}
    if surplus := set(tensors) - set(expected) - optional:
        raise SystemExit(f"RuntimeError: unexpected tensors {sorted(surplus)}")


def build_config(args: argparse.Namespace, data: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What builder.py leaves in config.json."""
    wanted = vars(args)
    found = {entry["build_config"]: wanted[name] for name, entry in data["flags"].items() if "build_config" in entry}
    found["kv_cache_type"] = (args.kv_cache_type or "paged").upper()
    found["max_seq_len"] = args.max_seq_len or config["max_position_embeddings"]
    found["max_input_len"] = min(args.max_input_len, found["max_seq_len"])
    found["max_num_tokens"] = min(args.max_num_tokens, found["max_seq_len"] * args.max_batch_size)
    if args.opt_num_tokens is None and args.multiple_profiles == "disable":
        found["opt_num_tokens"] = min(args.max_batch_size * args.max_beam_width, found["max_num_tokens"])
    found |= {"gather_generation_logits": args.gather_generation_logits or args.gather_all_token_logits,
              "strongly_typed": True, "speculative_decoding_mode": 1, "use_refit": False, "opt_batch_size": 8,
              "use_strip_plan": args.strip_plan, "lora_config": {}, "max_draft_len": args.max_draft_len,
              "max_prompt_embedding_table_size": args.max_prompt_embedding_table_size, "force_num_profiles": None,
              "max_encoder_input_len": args.max_encoder_input_len, "use_mrope": False}  # fmt: skip
    found["gather_context_logits"] = args.gather_context_logits or args.gather_all_token_logits
    plugins: dict[str, Any] = {"dtype": config["dtype"], "paged_kv_cache": found["kv_cache_type"] == "PAGED"}
    for name, entry in data["plugins"].items():
        value = wanted[name]
        if entry["type"] == "onoff":
            plugins[name] = value == "enable"
        else:
            plugins[name] = None if value == "disable" else value
    plugins |= {"use_fp8_context_fmha": False, "reduce_fusion": False, "user_buffer": False, "norm_quant_fusion": False}
    plugins["use_paged_context_fmha"] = plugins["use_paged_context_fmha"] and plugins["context_fmha"]
    plugins["nccl_plugin"] = config["dtype"] if config["mapping"]["world_size"] > 1 else None
    if config["quantization"]["quant_algo"]:
        plugins["weight_only_quant_matmul_plugin"] = config["dtype"]
    return found | {"plugin_config": plugins}


def refuse(args: argparse.Namespace, config: dict[str, Any]) -> None:
    if args.gather_context_logits and args.max_draft_len > 0:
        raise SystemExit("RuntimeError: Gather context logits is not support with draft len > 0.")
    if args.multiple_profiles == "enable" and args.opt_num_tokens is not None:
        raise SystemExit("RuntimeError: multiple_profiles is enabled, while opt_num_tokens is set.")
    if args.streamingllm == "enable":
        raise SystemExit("AssertionError: StreamingLLM is only supported in the llama model.")
    if args.pp_reduce_scatter == "enable":
        raise SystemExit("AssertionError: PP reduce scatter is only supported in the mixtral model.")
    if args.max_num_tokens < args.tokens_per_block:
        raise SystemExit("AssertionError: max_num_tokens must be at least tokens_per_block")
    if config.get("architecture") != "NemotronForCausalLM" or config.get("gpt_variant", "nemotron") != "nemotron":
        raise SystemExit("AssertionError: Unsupported model architecture")


def misbehave(how: str, output: Path) -> None:
    if how == "fail":
        print("[TRT-LLM] [E] Engine building failed, please check error log.", file=sys.stderr)
        raise SystemExit(1)
    if how == "cuda-out-of-memory":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", file=sys.stderr)
        raise SystemExit(1)
    if how == "killed":
        (output / "rank0.engine").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    if how.startswith("hang"):
        Path(how.partition(":")[2]).write_text(str(os.getpid()))
        time.sleep(600)


def main() -> None:
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    args = parser(data).parse_args()
    checkpoint, output, how = (
        Path(args.checkpoint_dir),
        Path(args.output_dir),
        os.environ.get("TRTLLM_BUILD_DOUBLE", ""),
    )
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    for block, known in KEYWORDS.items():
        if unknown := set(config[block]) - known:
            raise SystemExit(f"TypeError: unexpected keyword argument {sorted(unknown)[0]!r} in {block}")
    refuse(args, config)
    workers = min(int(os.environ.get("TRTLLM_BUILD_DOUBLE_GPUS", "8")), args.workers)
    if workers == 0:
        raise SystemExit("RuntimeError: no GPU")
    print(f"[TRT-LLM] [I] building with {workers} workers", flush=True)
    world = config["mapping"]["world_size"]
    files = {path.name for path in checkpoint.glob("rank*.safetensors")}
    if files != {f"rank{rank}.safetensors" for rank in range(world)}:
        raise SystemExit(f"AssertionError: {world} ranks and files {sorted(files)}")
    misbehave(how, output)
    ended = build_config(args, data, config)
    for rank in range(world):
        check_rank(config, rank, header(checkpoint / f"rank{rank}.safetensors"))
        (output / f"rank{rank}.engine").write_bytes(f"engine of rank {rank}\n".encode() * 100)
        print(f"[TRT-LLM] [I] rank {rank} serialised", flush=True)
    if how == "missing-rank":
        (output / f"rank{world - 1}.engine").unlink()
    if wrong := re.fullmatch(r"wrong:(\w+)=(.*)", how):
        ended[wrong[1]] = json.loads(wrong[2])
    pretrained = config | {"logits_dtype": args.logits_dtype or config["logits_dtype"], "moe": {"num_experts": 0}}
    if how != "no-config":
        document = {"version": VERSION, "pretrained_config": pretrained, "build_config": ended}
        (output / "config.json").write_text(json.dumps(document, indent=4))
    Path(args.output_timing_cache).write_bytes(b"timing cache")


if __name__ == "__main__":
    main()
