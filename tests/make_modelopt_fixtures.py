"""Let ModelOpt 0.47.0 quantise a small random Nemotron and export TensorRT-LLM checkpoints: tests/data/modelopt.

Needs the extra ``modelopt`` in an environment of its own (it wants torch and another numpy); ``make test-modelopt``
makes both, and compares::

    tools/make_venv.sh .venv-modelopt modelopt
    PYTHONPATH=models .venv-modelopt/bin/python tests/make_modelopt_fixtures.py [--check]

The model is written by the generator of random models, with the arguments in ``modelopt_cases.py``. Of exports that the
CPU engine runs the folders are kept, with the logits of transformers' model in float32 on the weights that the export
stands for (ModelOpt's own model in memory is another one: its simulated rounding parts from its export where a weight
lies half-way between two codes, one in 3,000 here). Of the others only config.json and the header of each rank are
kept. ``factors`` are pre-quant scales that we chose, for one case: what ModelOpt folds, rounds and packs by them must
be what ``convert`` does.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modelopt_cases as cases

OUTPUT = Path(__file__).parent / "data" / "modelopt"
_COMPACT = (",", ":")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def main() -> int:
    """Write every case, and index.json; with --check, elsewhere, and say what differs from the committed files."""
    if "--check" not in sys.argv:
        shutil.rmtree(OUTPUT, ignore_errors=True)
        _write(OUTPUT)
        return 0
    with tempfile.TemporaryDirectory() as made:
        _write(Path(made) / "modelopt")
        differs = _different(OUTPUT, Path(made) / "modelopt")
    print("\n".join(differs) or "ModelOpt exports what is committed")
    return int(bool(differs))


def _different(committed: Path, made: Path) -> list[str]:
    """Files that are not the same; of logits, that are more than rounding apart."""
    names = {path.relative_to(folder) for folder in (committed, made) for path in folder.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names):
        if not ((committed / name).is_file() and (made / name).is_file()):
            found.append(f"{name} is in one of them only")
        elif name.suffix == ".npy":
            if not np.allclose(np.load(committed / name), np.load(made / name), atol=1e-4):
                found.append(f"{name} differs")
        elif name.suffix != ".npz" and (committed / name).read_bytes() != (made / name).read_bytes():
            found.append(f"{name} differs")
    return found


def _write(output: Path) -> None:
    output.mkdir()
    index: dict[str, Any] = {"prompt": cases.PROMPT, "cases": {}}
    with tempfile.TemporaryDirectory() as made:
        source = cases.write_model(Path(made) / "model")
        for name, tp in cases.CASES:
            index["cases"][f"{name}-tp{tp}"] = _case(source, name, tp, Path(made), output)
    cases_ = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(case, separators=_COMPACT)}" for name, case in index["cases"].items()
    )
    text = f'{{"prompt": {json.dumps(cases.PROMPT)}, "cases": {{\n{cases_}\n}}}}\n'
    (output / "index.json").write_text(text, encoding="utf-8")


def _case(source: Path, name: str, tp: int, made: Path, output: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    model = mtq.quantize(model, _config(name), _calibrate)
    factors = _fold_given_factors(model) if name.startswith("given") else None
    folder = made / f"{name}-tp{tp}"
    export_tensorrt_llm_checkpoint(model, "gpt", torch.bfloat16, folder, inference_tensor_parallel=tp)
    found: dict[str, Any] = {"config": json.loads((folder / "config.json").read_text(encoding="utf-8")), "ranks": []}
    for rank in range(tp):
        with safe_open(folder / f"rank{rank}.safetensors", "numpy") as file:
            entries = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found["ranks"].append({key: [entry.get_dtype(), entry.get_shape()] for key, entry in entries.items()})
            if name.endswith("kv"):
                found["kv"] = {key: float(file.get_tensor(key)[0]) for key in entries if "kv_cache" in key}
    if name in cases.KEPT:
        (output / folder.name).mkdir()
        for rank in range(tp):
            shutil.copyfile(folder / f"rank{rank}.safetensors", output / folder.name / f"rank{rank}.safetensors")
        shutil.copyfile(folder / "config.json", output / folder.name / "config.json")
        if tp == 1:
            np.save(output / folder.name / "logits.npy", _logits(source, folder / "rank0.safetensors"))
    if factors is not None:
        np.savez(output / folder.name / "factors.npz", **factors)
    return found


def _logits(source: Path, export: Path) -> Any:
    """Logits [tokens, vocabulary] of the prompt by transformers' model in float32, with an export's weights."""
    stored = load_file(export)
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)

    def linear(name: str) -> Any:
        packed = stored[f"{name}.weight"].view(torch.uint8).int()
        codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1)
        codes = torch.where(codes > 7, codes - 16, codes).float()
        scales = stored[f"{name}.weights_scaling_factor"]
        weight = codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        return weight * stored.get(f"{name}.prequant_scaling_factor", torch.ones(codes.shape[1])).float()

    weights = {"model.embed_tokens.weight": stored["transformer.vocab_embedding.weight"],
               "lm_head.weight": stored["lm_head.weight"]}  # fmt: skip
    norms = [("transformer.ln_f", "model.norm")]
    hidden, kv = cases.SHAPE.hidden_size, cases.SHAPE.num_kv_heads * cases.SHAPE.head_size
    for index in range(cases.SHAPE.num_layers):
        ours, theirs = f"transformer.layers.{index}", f"model.layers.{index}"
        norms += [(f"{ours}.input_layernorm", f"{theirs}.input_layernorm"),
                  (f"{ours}.post_layernorm", f"{theirs}.post_attention_layernorm")]  # fmt: skip
        for part, weight in zip("qkv", linear(f"{ours}.attention.qkv").split([hidden, kv, kv]), strict=True):
            weights[f"{theirs}.self_attn.{part}_proj.weight"] = weight
        weights[f"{theirs}.self_attn.o_proj.weight"] = linear(f"{ours}.attention.dense")
        weights[f"{theirs}.mlp.up_proj.weight"] = linear(f"{ours}.mlp.fc")
        weights[f"{theirs}.mlp.down_proj.weight"] = linear(f"{ours}.mlp.proj")
    for ours, theirs in norms:
        weights[f"{theirs}.weight"] = stored[f"{ours}.weight"].float() - 1
        weights[f"{theirs}.bias"] = stored[f"{ours}.bias"]
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.inference_mode():
        return model(torch.tensor([cases.PROMPT])).logits[0].numpy()


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any]
    if name.startswith("given"):
        config = copy.deepcopy(mtq.INT4_AWQ_CFG) | {"algorithm": "max"}
    elif name == "bf16_int8_kv":
        int8 = {"num_bits": 8, "axis": None}
        off = [{"quantizer_name": "*", "enable": False}]
        config = {"quant_cfg": [*off, {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": int8, "enable": True}],
                  "algorithm": "max"}  # fmt: skip
    else:
        config = copy.deepcopy(getattr(mtq, cases.CONFIGS[name]))
    for rule in config["quant_cfg"]:
        cfg = rule.get("cfg")
        for each in cfg if isinstance(cfg, list) else [cfg] if cfg else []:
            if isinstance(each.get("block_sizes"), dict) and -1 in each["block_sizes"]:
                each["block_sizes"][-1] = cases.GROUPS.get(name, 128)
    return config


def _calibrate(model: Any) -> None:
    for row in cases.calibration_ids():
        model(torch.tensor(row)[None])


def _fold_given_factors(model: Any) -> dict[str, Any]:
    """Fold factors that bfloat16 holds, the same for q, k and v, and return them by the source's names."""
    found = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] in LINEAR:
            factors = cases.factors(name, module.weight.shape[1])
            apply_pre_quant_scale_and_smooth(module, torch.tensor(factors))
            found[f"{name}.weight"] = factors
    return found


if __name__ == "__main__":
    sys.exit(main())
