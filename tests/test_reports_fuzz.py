"""A fuzz over config.json: two thousand valid ones changed, converted, built and run, beside transformers.

Each ends in the tokens that transformers' own NemotronForCausalLM gives on the same folder, or in a refusal that names
a key that was changed; nothing silent is in between. The weights are the same for all, and so small a number of bits
that every type holds them, so that only what config.json says can make a difference. A slice without torch compares
what is read with NemotronConfig.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from minitron.errors import InputError, MinitronError
from minitron.model import shape
from minitron_build.checkpoint.convert import convert
from minitron_cli.main import PACKAGES

Config = dict[str, Any]
MUTATIONS, SLICE = 2000, 400
PROMPTS = ([5, 6, 7, 50, 51], [63, 1, 1, 2, 33, 40, 8])
NEW_TOKENS = 4

VERSION_4: Config = {
    "architectures": ["NemotronForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 3, "head_dim": 8, "hidden_act": "relu2", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "max_position_embeddings": 64, "mlp_bias": False, "model_type": "nemotron",
    "norm_eps": 1e-05, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 64,
}  # fmt: skip
VERSION_5: Config = {
    key: value for key, value in VERSION_4.items() if key not in ("rope_theta", "partial_rotary_factor", "torch_dtype")
} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "dtype": "float16", "pad_token_id": None, "transformers_version": "5.24.0",
}  # fmt: skip
BASES = (VERSION_4, VERSION_5, VERSION_4 | {"partial_rotary_factor": 1.0, "rope_theta": 500.0, "head_dim": None})

#: Names of other readers, with the key that each stands for (see test_reports_config.py).
ALSO = {"rope_percent": "partial_rotary_factor", "rope_percentage": "partial_rotary_factor",
        "rotary_pct": "partial_rotary_factor", "rotary_emb_fraction": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta"}  # fmt: skip
#: Keys for training and for how a prediction is computed.
NO_MATTER = ("use_cache", "initializer_range", "attention_dropout")
#: Other values that a key may have in some model.
VALUES: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (0.25, 0.5, 1.0, 0.3, 0.0, 1.5, -0.5, 1), "rope_theta": (500.0, 10000, 1e6, 0, -1.0),
    "norm_eps": (1e-3, 1e-5, 0.1, 1), "num_hidden_layers": (1, 2, 3), "num_attention_heads": (2, 4, 8, 5),
    "num_key_value_heads": (1, 2, 4, 3), "head_dim": (8, 4, 16), "hidden_size": (32, 64), "vocab_size": (64, 128),
    "intermediate_size": (48, 64), "hidden_act": ("relu2", "relu", "silu", "gelu_new"),
    "attention_bias": (False, True), "mlp_bias": (False, True), "tie_word_embeddings": (False, True),
    "torch_dtype": ("float16", "bfloat16", "float32", "half", "float64", "auto", "torch.float16"),
    "dtype": ("float16", "bfloat16", "float32", "int8"), "max_position_embeddings": (64, 128, 32),
    "architectures": (["LlamaForCausalLM"], [], ["NemotronForCausalLM"], "NemotronForCausalLM"),
    "model_type": ("nemotron", "llama"), "eos_token_id": (3, [3, 5], 2, [], -1, 100), "bos_token_id": (1, 2),
    "pad_token_id": (0, 1, -1), "use_cache": (False, True), "attention_dropout": (0.0, 0.1),
}  # fmt: skip
#: Keys that other models have, or that say how a model was saved.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "rope_scaling": ({}, {"type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "default",
                     "rope_theta": 500.0}, {"rope_type": "yarn", "factor": 4.0}, [1]),
    "rope_parameters": ({}, {"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "default",
                        "partial_rotary_factor": 0.25}, {"rope_type": "llama3", "factor": 8.0},
                        {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}}, {"rope_type": None}, []),
    "rope_percent": (0.25, 0.5, 1.0), "rope_percentage": (0.5, 1.0), "rotary_pct": (0.25, 0.5),
    "rotary_emb_fraction": (1.0,), "rotary_emb_base": (500, 10000.0), "kv_channels": (8, 16),
    "sliding_window": (None, 4), "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2),
    "per_layer_config": ({}, {"1": {"intermediate_size": 16}}), "quantization_config": ({"quant_method": "gptq"},),
    "pruned_heads": ({}, {"0": [1]}), "is_encoder_decoder": (False, True), "rms_norm_eps": (1e-2,),
    "layer_norm_eps": (1e-2,), "logit_scale": (4.0,), "attn_logit_softcapping": (1.0,), "q_scaling": (2.0,),
    "rotary_dim": (8,), "original_max_position_embeddings": (16,), "auto_map": ({"AutoConfig": "x.Y"},),
    "transformers_version": ("4.40.0",), "torch_dtype": ("float16",), "dtype": ("float32",),
    "initializer_range": (1.0,), "output_hidden_states": (True,), "id2label": ({"0": "a"},), "made_up": ({"a": [1]},),
}  # fmt: skip


def other_type(value: Any, pick: random.Random) -> Any:
    """The same value in another type, or none at all."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    choices: list[Any] = [None, str(value), [value], {"value": value}, True, ""]
    if number:
        choices += [value + 0.5, float(value), -value, value * 10**30, float("nan")]
    return pick.choice(choices)


def mutated(number: int) -> tuple[Config, set[str]]:
    """The config of this number, and the keys in which it differs from a valid one."""
    pick = random.Random(number)
    base = pick.choice(BASES)
    config = copy.deepcopy(base)
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        key, kind = pick.choice(sorted(config)), pick.randrange(5)
        if kind == 0:
            config.pop(key)
        elif kind == 1:
            config[key] = other_type(config[key], pick)
        elif kind == 2 and key in VALUES:
            config[key] = pick.choice(VALUES[key])
        elif kind == 3:
            foreign = pick.choice(sorted(FOREIGN))
            config[foreign] = pick.choice(FOREIGN[foreign])
        else:
            _respell(config, pick)
    changed = {key for key in base | config
               if json.dumps(base.get(key, "gone")) != json.dumps(config.get(key, "gone"))}  # fmt: skip
    for key in ("rope_parameters", "rope_scaling"):  # and what is inside
        changed |= set(config[key]) if key in changed and isinstance(config.get(key), dict) else set()
    return config, changed


def _respell(config: Config, pick: random.Random) -> None:
    """Put a number of the rotation where another reader or version has it."""
    inside = config.get("rope_parameters")
    holder = inside if isinstance(inside, dict) and inside else config
    key = pick.choice(("partial_rotary_factor", "rope_theta"))
    if key not in holder:
        return
    value = holder.pop(key)
    place = pick.choice(("top", "rope_parameters", "rope_scaling", "also"))
    if place == "top":
        config[key] = value
    elif place == "also":
        config[pick.choice([name for name, meant in ALSO.items() if meant == key])] = value
    else:
        there = config.get(place)
        config[place] = (there if isinstance(there, dict) else {}) | {key: value}


def _named_by_vllm_only(config: Config) -> list[str]:
    """Names that transformers passes over where it has none of its own to read."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return [name for name, key in ALSO.items() if config.get(name) is not None and key not in config
            and key not in rope]  # fmt: skip


def meant(config: Config) -> Config:
    """What a config means where transformers 5.24 fails on it or passes a name over that vLLM reads.

    Such names stand for theirs; num_key_value_heads null is as many as heads (NemotronConfig's documentation); a type
    may be spelled "torch.float16" (transformers 4), norm_eps as a whole number; keys that change no prediction, whose
    types transformers 5 checks all the same, are left out.
    """
    config = copy.deepcopy(config)
    config |= {ALSO[name]: config[name] for name in _named_by_vllm_only(config)}
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads", shape.DEFAULTS["num_attention_heads"])
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            config[key] = config[key].removeprefix("torch.")
    if type(config.get("norm_eps")) is int:
        config["norm_eps"] = float(config["norm_eps"])
    return {key: value for key, value in config.items() if key not in NO_MATTER}


class Log(logging.Handler):
    """Lines that the toolkit logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def refusal_names(error: Exception, log: Log, changed: set[str]) -> bool:
    """Whether a refusal, or a line before it, names one of the keys."""
    return any(key in text for key in changed for text in (str(error), *log.lines))


@pytest.fixture
def log() -> Any:
    """What the toolkit logs during a test."""
    handler = Log()
    for package in PACKAGES:
        logging.getLogger(package).addHandler(handler)
    yield handler
    for package in PACKAGES:
        logging.getLogger(package).removeHandler(handler)


def said_if_only_vllm_reads_it(config: Config, log: Log) -> bool:
    """A name that transformers passes over, and that changes what it would do, is obeyed with a line about it."""
    differing = [name for name in _named_by_vllm_only(config) if config[name] != shape.DEFAULTS[ALSO[name]]]
    return not differing or any(name in line for name in differing for line in log.lines)


def test_a_slice_is_read_as_nemotron_config_reads_it(log: Log) -> None:
    """Without weights and torch: every config is read the same, or refused by a key that was changed."""
    from transformers import NemotronConfig

    read = 0
    for number in range(SLICE):
        config, changed = mutated(number)
        log.lines.clear()
        try:
            found = shape.from_config(json.loads(json.dumps(config)), "config.json")
        except InputError as error:
            assert refusal_names(error, log, changed), f"{number}: {error}, and {changed} was changed"
            continue
        theirs = NemotronConfig(**{key: value for key, value in meant(config).items() if not key.endswith("_token_id")})
        rope = theirs.rope_parameters
        assert (found.rotary_share, found.rotary_base) == (rope["partial_rotary_factor"], rope["rope_theta"]), number
        assert rope["rope_type"] == "default", number
        assert (
            found.vocab_size, found.hidden_size, found.intermediate_size, found.num_layers, found.num_heads,
            found.num_kv_heads, found.head_size, found.norm_epsilon, found.tied_embeddings,
        ) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers,
            theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim, theirs.norm_eps,
            theirs.tie_word_embeddings,
        ), number  # fmt: skip
        assert said_if_only_vllm_reads_it(config, log), number
        read += 1
    assert SLICE / 5 < read < SLICE * 4 / 5


# --- converted, built and run beside transformers -----------------------------------------------------------------


def weights(folder: Path) -> None:
    """Weights of the bases' sizes: multiples of 1/64, and of 1/8 where a norm adds one to them."""
    draw = np.random.default_rng(7)
    rows = {"embed_tokens": (64, 32), "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32), "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
    tensors: dict[str, NDArray[np.float32]] = {}

    def add(name: str, sizes: tuple[int, ...]) -> None:
        if len(sizes) > 1:
            tensors[f"{name}.weight"] = draw.integers(-40, 41, sizes).astype(np.float32) / 64
        else:
            for part in ("weight", "bias"):
                tensors[f"{name}.{part}"] = draw.integers(-3, 4, sizes).astype(np.float32) / 8

    for name, sizes in rows.items():
        for layer in range(2) if "." in name or "norm" in name else [None]:
            add(f"model.{name}" if layer is None else f"model.layers.{layer}.{name}", sizes)
    add("model.norm", (32,))
    add("lm_head", (64, 32))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def greedy(logits: Callable[[list[int]], NDArray[np.float32]]) -> list[list[int]]:
    """The best token each time, from whole prompts; end tokens end nothing."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(logits(ids)[-1].argmax()))
        found.append(ids[len(prompt) :])
    return found


class Ours:
    """Converts, builds and runs; a checkpoint that came out before is not run again."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._known = scratch, {}  # type: Path, dict[str, list[list[int]]]

    def tokens(self, folder: Path) -> tuple[list[list[int]], Any]:
        """Greedy tokens of the model in ``folder``, and its end ids; raises what converting and building raise."""
        out = self._scratch / "checkpoint"
        done = convert(folder, out, force=True)
        digest = hashlib.sha256((out / "config.json").read_bytes() + (out / "rank0.safetensors").read_bytes())
        if digest.hexdigest() not in self._known:
            self._known[digest.hexdigest()] = self._run(out)
        ids = json.loads((done.folder / "tokenizer" / "generation_config.json").read_text())
        return self._known[digest.hexdigest()], ids.get("eos_token_id")

    def _run(self, checkpoint: Path) -> list[list[int]]:
        import cpu_engines
        from minitron.machine.openvino import process_core
        from minitron_build.engines.openvino import write

        built = self._scratch / "engine"
        shutil.rmtree(built, ignore_errors=True)
        write.build(checkpoint, built, write.CpuOptions())
        xml = built / "openvino" / "openvino_model.xml"
        compiled = process_core().compile_model(str(xml), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
        return greedy(lambda ids: cpu_engines._logits(compiled, np.array(ids)))


def theirs(folder: Path) -> tuple[list[list[int]], Any]:
    """The same of transformers' own model, read from the folder in float32."""
    import torch
    from transformers import NemotronForCausalLM

    model = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        tokens = greedy(lambda ids: np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0]))
    return tokens, model.generation_config.eos_token_id


@pytest.mark.reference
def test_two_thousand_configs_end_in_transformers_tokens_or_in_a_key(tmp_path: Path, log: Log) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    folder, ours, counts = tmp_path / "model", Ours(tmp_path), Counter[str]()
    folder.mkdir()
    weights(folder)
    for number in range(MUTATIONS):
        config, changed = mutated(number)
        (folder / "config.json").write_text(json.dumps(config))
        log.lines.clear()
        try:
            found, ends = ours.tokens(folder)
        except MinitronError as error:
            assert refusal_names(error, log, changed), f"{number}: {error}, and {changed} was changed"
            counts["refused by name"] += 1
            continue
        (folder / "config.json").write_text(json.dumps(meant(config)))
        right, their_ends = theirs(folder)
        assert found == right, f"{number}: {config}"
        assert said_if_only_vllm_reads_it(config, log), number
        usable = [token for token in _list(their_ends) if token < config.get("vocab_size", 0) and token >= 0]
        assert _list(ends) == usable, f"{number}: ends {ends}, transformers {their_ends}"
        counts["the same tokens"] += 1
    print(dict(counts))
    assert min(counts.values()) > MUTATIONS / 5


def _list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
