"""What a config.json says and leaves out: situations that people reported elsewhere, with what is right.

Right is what transformers' NemotronConfig reads, which is asked about every row that it takes (without torch), or, for
names that only vLLM reads, what vLLM's NemotronConfig and ``patch_rope_parameters`` read.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DATA
from minitron.errors import ModelError
from minitron.model import shape
from minitron_build.checkpoint.convert import convert

HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
CONFIG: dict[str, Any] = json.loads((HF / "config.json").read_text(encoding="utf-8"))
GONE = ...


def changed(**changes: Any) -> dict[str, Any]:
    """The golden model's config.json with keys changed, or left out where the value is ``GONE``."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not GONE}


@dataclass(frozen=True)
class Row:
    """A config.json, who reported it or reads it so, and the fields of the shape that are right."""

    about: str
    source: str
    changes: dict[str, Any]
    right: dict[str, Any]
    says: str = ""  # what the one line of warning has in it
    transformers: bool = True  # whether NemotronConfig reads the same


HALF = {"rotary_share": 0.5}
TOP = {"rope_theta": GONE, "partial_rotary_factor": GONE}
READ = [
    Row("no partial_rotary_factor", "vllm#30389, transformers#48486", {"partial_rotary_factor": GONE}, HALF,
        "partial_rotary_factor 0.5"),
    Row("no rope key at all", "NemotronConfig", TOP, HALF | {"rotary_base": 10000.0}, "rope_theta 10000"),
    Row("rope_parameters without a share", "transformers#48486",
        TOP | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, HALF | {"rotary_base": 5e5},
        "partial_rotary_factor 0.5"),
    Row("rope_parameters without a base", "transformers#48486",
        TOP | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rotary_share": 0.25, "rotary_base": 10000.0}, "rope_theta 10000"),
    Row("one number there and one here", "convert_rope_params_to_dict",
        {"rope_theta": 2e4, "partial_rotary_factor": GONE, "rope_parameters": {"partial_rotary_factor": 0.25}},
        {"rotary_share": 0.25, "rotary_base": 2e4}),
    Row("rope_scaling is the older name", "convert_rope_params_to_dict",
        TOP | {"rope_scaling": {"type": "default", "rope_theta": 3e4, "partial_rotary_factor": 1.0}},
        {"rotary_share": 1.0, "rotary_base": 3e4}),
    Row("rope_scaling wins over rope_parameters", "convert_rope_params_to_dict",
        TOP | {"rope_scaling": {"type": "default", "rope_theta": 3e4},
               "rope_parameters": {"rope_type": "default", "rope_theta": 4e4}}, {"rotary_base": 3e4},
        "partial_rotary_factor"),
    Row("an empty rope_scaling", "convert_rope_params_to_dict", {"rope_scaling": {}, "rope_parameters": {}}, HALF),
    Row("whole heads, as an integer", "NemotronConfig", {"partial_rotary_factor": 1}, {"rotary_share": 1.0}),
    Row("no norm_eps", "NemotronConfig", {"norm_eps": GONE}, {"norm_epsilon": 1e-5}, "norm_eps 1e-05"),
    Row("no max_position_embeddings", "NemotronConfig", {"max_position_embeddings": GONE}, {"max_positions": 4096},
        "max_position_embeddings 4096"),
    Row("no head_dim", "NemotronConfig", {"head_dim": GONE}, {"num_heads": 4}),
    Row("head_dim null", "NemotronConfig", {"head_dim": None}, {"num_heads": 4}),
    Row("no tie_word_embeddings", "NemotronConfig", {"tie_word_embeddings": GONE}, {"tied_embeddings": False}),
    Row("num_key_value_heads null, as transformers writes it", "vLLM and the documentation: as many as heads",
        {"num_key_value_heads": None}, {"num_kv_heads": 4}, transformers=False),
    Row("dtype null beside torch_dtype", "PreTrainedConfig.__post_init__", {"dtype": None}, {"dtype": "bfloat16"}),
    Row("dtype beside another torch_dtype", "PreTrainedConfig.__post_init__", {"dtype": "float16"},
        {"dtype": "float16"}),
    Row("torch's other name of a type", "getattr(torch, 'half')", {"torch_dtype": "half"}, {"dtype": "float16"}),
    Row("rope_percent", "TensorRT-LLM's converter, vLLM", {"partial_rotary_factor": GONE, "rope_percent": 0.25},
        {"rotary_share": 0.25}, "transformers reads only partial_rotary_factor", transformers=False),
    Row("rope_percentage", "vLLM", {"partial_rotary_factor": GONE, "rope_percentage": 1.0}, {"rotary_share": 1.0},
        "transformers reads only", transformers=False),
    Row("rotary_pct", "vLLM", {"partial_rotary_factor": GONE, "rotary_pct": 1.0}, {"rotary_share": 1.0},
        "transformers reads only", transformers=False),
    Row("rotary_emb_base", "vLLM", {"rope_theta": GONE, "rotary_emb_base": 5e5}, {"rotary_base": 5e5},
        "transformers reads only rope_theta", transformers=False),
    Row("two names that agree", "vLLM", {"rope_percent": 0.5, "rotary_pct": 0.5, "kv_channels": 32}, HALF),
    Row("architectures null", "AutoModelForCausalLM goes by model_type", {"architectures": None}, HALF),
    Row("no architectures", "AutoModelForCausalLM goes by model_type", {"architectures": GONE}, HALF),
    Row("architectures as one word", "AutoModelForCausalLM goes by model_type",
        {"architectures": "NemotronForCausalLM"}, HALF),
    Row("no model_type", "NemotronForCausalLM.from_pretrained", {"model_type": GONE}, HALF),
    Row("keys of other models, that NemotronForCausalLM does not look at", "modeling_nemotron.py",
        {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-6, "attn_logit_softcapping": 30.0, "logit_scale": 2.0,
         "attention_dropout": 0.5, "initializer_range": 1.0, "use_cache": False, "auto_map": {"AutoConfig": "x.Y"}},
        HALF | {"norm_epsilon": 1e-5}),
    Row("all layers of the one kind", "PreTrainedConfig.layer_types", {"layer_types": ["full_attention"] * 2}, HALF),
]  # fmt: skip

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a share of null: transformers fails on it", {"partial_rotary_factor": None}, "partial_rotary_factor"),
    ("a share in words", {"partial_rotary_factor": "0.5"}, "partial_rotary_factor"),
    ("a base of null", {"rope_theta": None}, "rope_theta"),
    ("a base of null in rope_parameters", {"rope_parameters": {"rope_theta": None}}, "rope_theta"),
    ("a type of null", {"rope_parameters": {"rope_type": None}}, "rope_parameters"),
    ("scaled, llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters"),
    ("scaled under the old name", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    ("by kinds of layer", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
    ("no object", {"rope_parameters": [1]}, "rope_parameters"),
    ("transformers 4 reads the one, 5 the other", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    ("vLLM reads the one, transformers the other", {"rope_percent": 1.0}, "rope_percent"),
    ("heads of another size", {"head_dim": 64}, "head_dim"),
    ("heads of another size, vLLM's name", {"kv_channels": 64}, "kv_channels"),
    ("another activation", {"hidden_act": "relu"}, "hidden_act"),
    ("no activation", {"hidden_act": None}, "hidden_act"),
    ("biases", {"mlp_bias": True}, "mlp_bias"),
    ("an integer for a truth", {"attention_bias": 0}, "attention_bias"),
    ("an integer for a truth", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("a window", {"sliding_window": 4}, "sliding_window"),
    ("layers with a window", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("layers of their own sizes", {"per_layer_config": {"0": {"intermediate_size": 64}}}, "per_layer_config"),
    ("heads cut off at load", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("quantised weights", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("another config for this version", {"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
    ("an encoder too", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("another family under a Nemotron's name", {"model_type": "llama"}, "model_type"),
    ("a Nemotron under another family's name", {"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ("the same without its head", {"architectures": ["NemotronForSequenceClassification"]}, "architectures"),
    ("neither architectures nor model_type", {"architectures": None, "model_type": None}, "model_type"),
    ("a type that is none", {"torch_dtype": "auto"}, "torch_dtype"),
    ("sizes as text", {"hidden_size": "128"}, "hidden_size"),
    ("sizes as fractions", {"intermediate_size": 256.0}, "intermediate_size"),
]  # fmt: skip


@pytest.mark.parametrize("row", READ, ids=lambda row: row.about)
def test_a_config_is_read_as_its_own_library_reads_it(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    found = shape.from_config(changed(**row.changes), "config.json")
    assert {name: getattr(found, name) for name in row.right} == row.right
    assert bool(caplog.messages) == bool(row.says)
    assert row.says in " ".join(caplog.messages)
    assert len(caplog.messages) < 2
    if row.transformers:
        assert _as_nemotron_config_reads(changed(**row.changes)) == {
            "vocab_size": found.vocab_size, "hidden_size": found.hidden_size,
            "intermediate_size": found.intermediate_size, "num_hidden_layers": found.num_layers,
            "num_attention_heads": found.num_heads, "num_key_value_heads": found.num_kv_heads,
            "max_position_embeddings": found.max_positions, "norm_eps": found.norm_epsilon,
            "head_dim": found.head_size, "tie_word_embeddings": found.tied_embeddings,
            "rope_theta": found.rotary_base, "partial_rotary_factor": found.rotary_share,
        }  # fmt: skip


def _as_nemotron_config_reads(raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import NemotronConfig

    read = NemotronConfig(**json.loads(json.dumps(raw)))
    rope = {key: read.rope_parameters[key] for key in ("rope_theta", "partial_rotary_factor")}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "norm_eps", "head_dim",
             "tie_word_embeddings")  # fmt: skip
    return {name: getattr(read, name) for name in names} | rope


@pytest.mark.parametrize(
    ("about", "changes", "key"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_it_cannot_be_is_refused_by_the_key(about: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=key):
        shape.from_config(changed(**changes), "the file")


# --- tensors in another but equal form ----------------------------------------------------------------------------

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, Any]


def _head_alone(tensors: Tensors) -> Tensors:
    return {HEAD: tensors[EMBEDDING]} | {name: array for name, array in tensors.items() if name != EMBEDDING}


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def _buffers(tensors: Tensors) -> Tensors:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
             "model.rotary_emb.original_inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached")  # fmt: skip
    return tensors | {name: np.full(8, 7, np.float32) for name in names}


#: name: (who, what becomes of a tied model's tensors), each loaded by AutoModelForCausalLM of transformers 5.24.
FORMS: dict[str, tuple[str, Any]] = {
    "only the head": ("transformers#38870", _head_alone),
    "the embedding alone": ("save_pretrained", lambda tensors: tensors),
    "both, equal": ("torch's .bin files", lambda tensors: tensors | {HEAD: tensors[EMBEDDING]}),
    "saved without its head": ("NemotronModel.save_pretrained", _bare),
    "saved without its head, the head beside": (
        "NemotronModel.save_pretrained", lambda tensors: _bare(_head_alone(tensors))),
    "wrapped once more": (
        "a model inside another one", lambda tensors: {f"model.{name}": a for name, a in tensors.items()}),
    "buffers wherever they hang": ("exports of older code; transformers passes over rotary_emb.inv_freq", _buffers),
}  # fmt: skip


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """The golden model with a tied head, whose weights are small whole numbers."""
    folder = tmp_path / "tied"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(changed(tie_word_embeddings=True)))
    random = np.random.default_rng(1)
    tensors = {name: random.integers(-3, 4, array.shape).astype(ml_dtypes.bfloat16)
               for name, array in load_file(HF / "model.safetensors").items() if name != HEAD}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_tensors_in_an_equal_form_are_the_same_model(form: str, tied: Path, tmp_path: Path) -> None:
    convert(tied, tmp_path / "right")
    save_file(FORMS[form][1](load_file(tied / "model.safetensors")), tied / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    convert(tied, tmp_path / "out")
    rank = "rank0.safetensors"
    assert (tmp_path / "out" / rank).read_bytes() == (tmp_path / "right" / rank).read_bytes()


@pytest.mark.reference
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_that_form(form: str, tied: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 100]])
    right = AutoModelForCausalLM.from_pretrained(tied).eval()(ids).logits
    shutil.copytree(tied, tmp_path / "other")
    save_file(FORMS[form][1](load_file(tied / "model.safetensors")), tmp_path / "other" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval()(ids).logits, right)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {n: a for n, a in tensors.items() if n != EMBEDDING}, "tie_word_embeddings"),
        (lambda tensors: tensors | {"lm_head.bias": np.zeros(160, np.float32)}, "unknown to a Nemotron"),
        (lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]}, "under another name"),
    ],
)
def test_what_is_no_equal_form_is_refused(change: Any, words: str, tied: Path, tmp_path: Path) -> None:
    save_file(change(load_file(tied / "model.safetensors")), tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        convert(tied, tmp_path / "out")
