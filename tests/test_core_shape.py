"""Reading config.json. Expected values: the model's published description, in transformers 4's and 5's spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.errors import ModelError
from minitron.model import shape

#: transformers 4, as nvidia/Minitron-4B-Base is published (numbers: the model's published description).
V4: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"], "attention_bias": False, "mlp_bias": False, "hidden_act": "relu2",
    "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 4096, "norm_eps": 1e-05,
    "num_attention_heads": 24, "head_dim": 128, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (V4 | changes).items() if value is not ...}


def test_minitron_4b() -> None:
    found = shape.from_config(V4, "here")
    assert (found.head_size, found.rotary_size, found.num_kv_heads, found.dtype) == (128, 64, 8, "bfloat16")
    # By hand: 32 x (3072 x (3072 + 2 x 1024 + 3072 + 2 x 9216) + 4 x 3072) + 2 x 256000 x 3072 + 2 x 3072
    assert found.parameters == 4_190_509_056


def test_transformers_5_spelling_means_the_same() -> None:
    v5 = changed(rope_theta=..., partial_rotary_factor=..., torch_dtype=..., dtype="bfloat16",
                 rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                 )  # fmt: skip
    assert shape.from_config(v5, "here") == shape.from_config(V4, "here")


def test_rope_percent_is_the_old_name() -> None:
    found = shape.from_config(changed(partial_rotary_factor=..., rope_percent=0.25), "here")
    assert found.rotary_size == 32


def test_without_any_share_half_of_each_head_is_rotated(caplog: pytest.LogCaptureFixture) -> None:
    """As NemotronConfig has it (transformers 4.57 and 5)."""
    assert shape.from_config(changed(partial_rotary_factor=...), "here").rotary_share == 0.5
    assert "partial_rotary_factor" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ..., "model_type": "llama"}, "llama"),
        ({"head_dim": 96}, "24 heads of 96"),
        ({"num_attention_heads": 32, "head_dim": ...}, None),
        ({"num_attention_heads": 32}, "32 heads of 128"),  # what the model card's text says
        ({"num_key_value_heads": 7}, "7 key/value heads"),
        ({"hidden_size": "3072"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"norm_eps": None}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"partial_rotary_factor": 1.5}, "1.5"),
        ({"partial_rotary_factor": 0.001}, "rotated"),
        ({"torch_dtype": "int8"}, "int8"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], named: str | None) -> None:
    if named is None:  # 32 heads of 96 make 3072: consistent in itself, so nothing to refuse
        assert shape.from_config(changed(**changes), "here").head_size == 96
        return
    with pytest.raises(ModelError, match=named) as error:
        shape.from_config(changed(**changes), "the/config.json")
    assert "the/config.json" in str(error.value)


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        shape.read(path)


def test_read_is_load_and_from_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V4))
    assert shape.read(tmp_path / "config.json") == shape.from_config(V4, "x")
