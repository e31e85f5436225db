"""A TensorRT-LLM checkpoint's config.json that others wrote: obeyed, or refused by the key that changes the model.

Sources: the defaults of TensorRT-LLM 1.2.0rc2 (``models/modeling_utils.py`` PretrainedConfig and QuantConfig, 1.x
``models/gpt/config.py``), and files that nvidia-modelopt 0.47.0 and megatron-core 0.16.1 wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA
from minitron.errors import CheckpointError
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.read import Checkpoint

HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
GONE = ...
BLOCKS = ("quantization", "mapping", "moe")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's checkpoint in float16."""
    return convert(HF, tmp_path_factory.mktemp("checkpoint") / "c", precision="float16").folder


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A folder with its weights, and a config.json to be changed."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "rank0.safetensors").symlink_to(converted / "rank0.safetensors")
    (folder / "config.json").write_bytes((converted / "config.json").read_bytes())
    return folder


def change(folder: Path, changes: dict[str, Any]) -> Path:
    """Change keys of config.json, ``block.key`` within a block; ``GONE`` leaves one out."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *block, key = name.split(".")
        holder = config.setdefault(block[0], {}) if block else config
        if value is GONE:
            holder.pop(key, None)
        else:
            holder[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


#: (what, keys): each means what this toolkit writes.
SAME: list[tuple[str, dict[str, Any]]] = [
    ("ModelOpt's names", {"architecture": "GPTForCausalLM", "hidden_act": "relu2", "logits_dtype": "float16",
                          "producer": {"name": "modelopt"}, "rank": 0, "decoder": "gpt", "rmsnorm": False}),
    ("every key of the official converter", {
        "moe.num_experts": 0, "moe.top_k": 0, "mapping.gpus_per_node": 8, "mapping.cp_size": 1,
        "mapping.cp_config": {}, "mapping.enable_attention_dp": False, "quantization.group_size": 128,
        "quantization.smoothquant_val": 0.5, "quantization.clamp_val": None, "quantization.has_zero_point": False,
        "quantization.mamba_ssm_cache_dtype": None, "quantization.use_meta_recipe": False, "runtime_defaults": None,
        "rotary_embedding_dim": 32, "quantization.pre_quant_scale": False, "quantization.exclude_modules": None}),
    ("the least that loads", dict.fromkeys((
        "norm_epsilon", "rotary_base", "rotary_scaling", "q_scaling", "embedding_scale", "qk_layernorm", "head_size",
        "apply_query_key_layer_scaling", "inner_layernorm", "norm_before_bmm1", "mapping", "quantization"), GONE)),
    ("what is left out of a quantisation that is none", {"quantization.exclude_modules": ["lm_head"]}),
    ("a scaling of one", {"q_scaling": 1.0, "embedding_scale": 1.0}),
]  # fmt: skip

#: Keys that change the model.
REFUSED: dict[str, Any] = {
    "q_scaling": 2.0, "hidden_act": "gelu", "position_embedding_type": "learned_absolute",
    "rotary_scaling": {"type": "linear", "factor": 2.0}, "embedding_scale": 16.0, "bias": True, "qk_layernorm": True,
    "norm_before_bmm1": True, "inner_layernorm": True, "apply_query_key_layer_scaling": True, "rmsnorm": True,
    "is_pruned": True, "quantization.kv_cache_quant_algo": "INT8", "quantization.has_zero_point": True,
    "quantization.pre_quant_scale": True, "quantization.clamp_val": [0.0, 1.0], "quantization.use_meta_recipe": True,
    "quantization.quant_algo": "FP8", "quantization.activation_scheme": "dynamic", "quantization": "W8A16",
    "mapping.cp_size": 2, "mapping.enable_attention_dp": True, "moe.num_experts": 8, "moe_num_experts": 8,
    "head_size": 64, "rotary_pct": 1.5, "architecture": "LlamaForCausalLM", "norm_epsilon": None, "rotary_base": "1e4",
}  # fmt: skip


@pytest.mark.parametrize(("what", "changes"), SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_what_means_the_same_is_read_the_same(what: str, changes: dict[str, Any], checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as plain, Checkpoint.open(change(checkpoint, changes)) as found:
        assert found.spec == plain.spec


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_the_model_is_refused_by_its_name(key: str, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*\b{key.rpartition('.')[2]}\b"):
        Checkpoint.open(change(checkpoint, {key: REFUSED[key]}))


@pytest.mark.parametrize("key", ["bias", "hidden_act", "position_embedding_type"])
def test_a_key_left_out_means_what_tensorrt_llm_takes(key: str, checkpoint: Path) -> None:
    """Biases, gelu and learned positions, which are not in the files."""
    with pytest.raises(CheckpointError, match=rf"{key} is not there, which means"):
        Checkpoint.open(change(checkpoint, {key: GONE}))


def test_rotary_pct_left_out_is_the_whole_head(converted: Path, checkpoint: Path) -> None:
    """GPTConfig: 1.0. The tables in the file are then of another size, and the folder is refused for that."""
    with pytest.raises(CheckpointError, match="embed_positions is F32"):
        Checkpoint.open(change(checkpoint, {"rotary_pct": GONE}))


def test_modules_left_out_of_a_weight_only_quantisation_are_refused(tmp_path: Path) -> None:
    """An empty list turns TensorRT-LLM's own off, and the model no longer loads there."""
    done = convert(HF, tmp_path / "c", precision="int8_weight_only")
    for modules in ([], ["lm_head"]):
        with pytest.raises(CheckpointError, match="exclude_modules"):
            Checkpoint.open(change(done.folder, {"quantization.exclude_modules": modules}))
