"""``PretrainedConfig`` and ``MODEL_MAP`` as trtllm-build uses them (TensorRT-LLM 1.2 models/modeling_utils.py)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tensorrt_llm import HOW

_KEYWORDS = {"mapping": {"world_size", "tp_size", "pp_size"}, "quantization": {"quant_algo", "kv_cache_quant_algo"}}


class PretrainedConfig:
    """A checkpoint's config with TensorRT-LLM's own additions."""

    def __init__(self, values: dict[str, Any]) -> None:
        for block, known in _KEYWORDS.items():
            if unknown := set(values[block]) - known:
                raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r} in {block}")
        self._values = values
        self.architecture = values["architecture"]
        self.mapping = SimpleNamespace(**values["mapping"])

    @classmethod
    def from_json_file(cls, path: str) -> PretrainedConfig:
        return cls(json.loads(Path(path).read_text()))

    def set_rank(self, rank: int) -> None:
        assert rank < self.mapping.world_size
        self.rank = rank

    def to_dict(self) -> dict[str, Any]:
        read = self._values | {"rotary_embedding_dim": self._values["head_size"], "moe": {"num_experts": 0}}
        read["quantization"] = self._values["quantization"] | {"group_size": 128}
        if HOW.startswith("config:"):
            del read[HOW.partition(":")[2]]
        return read


class GPTForCausalLM:
    """Loads a rank's file as far as its header goes."""

    @classmethod
    def from_checkpoint(cls, folder: str, config: PretrainedConfig) -> GPTForCausalLM:
        with open(Path(folder, f"rank{config.rank}.safetensors"), "rb") as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if HOW == "load":
            raise RuntimeError("Required but not provided tensors:{'lm_head.weight'}")
        return cls()


MODEL_MAP = {"NemotronForCausalLM": GPTForCausalLM}
