"""Engine folders made by hand: everything that a repository reads of an engine, and nothing that could run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizer_files
from minitron.artifacts import manifest
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.repository.render import render

WORDS = ("▁the", "▁quick", "▁brown", "▁fox", "▁jumps", "▁stop", "ped", "▁here", "and", "▁now", "é", "日")


def sentencepiece_tokenizer(folder: Path) -> int:
    """Write a SentencePiece-style tokenizer with byte fallback into ``folder``; returns its number of ids."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'-"]
    partial = sorted({word[:end] for word in WORDS for end in range(2, len(word))} - set(WORDS))
    pieces = [*tokenizer_files.SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += [piece for piece in (*partial, *WORDS) if piece not in pieces]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_files.write(folder, b"", [(piece, -float(place)) for place, piece in enumerate(pieces)], 512)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1})
    )
    return len(pieces)


def engine_folder(
    folder: Path,
    *,
    cpu: bool,
    tokenizer: bool = True,
    tp: int = 1,
    limits: dict[str, int] | None = None,
    plugins: dict[str, Any] | None = None,
    logits_dtype: str = "float32",
    build_config: dict[str, Any] | None = None,
) -> Path:
    """Write an engine folder: config.json with a TensorRT-LLM engine's three keys, empty engine files, manifest."""
    folder.mkdir(parents=True)
    size = sentencepiece_tokenizer(folder / "tokenizer") if tokenizer else 512
    config: dict[str, Any] = {
        "version": "openvino 2026.4.1" if cpu else "1.2.1",
        "pretrained_config": {
            "architecture": "NemotronForCausalLM", "vocab_size": size, "dtype": "bfloat16",
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 32,
            "hidden_size": 128, "intermediate_size": 256,
            "logits_dtype": logits_dtype, "mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1},
        },
        "build_config": {
            "max_batch_size": 16, "max_input_len": 128, "max_seq_len": 256, "max_num_tokens": 1024,
            "max_beam_width": 1, "plugin_config": plugins or {},
        } | (limits or {}) | (build_config or {}),
    }  # fmt: skip
    if cpu:
        config["cpu"] = {"execution": "exact", "lm_head": "as_is", "properties": {"EXECUTION_MODE_HINT": "ACCURACY"}}
        (folder / "openvino").mkdir()
        names = ["openvino/openvino_model.xml", "openvino/openvino_model.bin"]
    else:
        names = [f"rank{rank}.engine" for rank in range(tp)]
    for name in names:
        (folder / name).write_bytes(b"made by hand")
    (folder / "config.json").write_text(json.dumps(config))
    made_from = manifest.Input(kind="checkpoint", path="checkpoint", digest="0" * 64)
    details = {"target": "cpu" if cpu else "a100-80gb", "vocab_size": size, "has_tokenizer": tokenizer}
    manifest.write(folder, "engine", made_from, arguments={}, details=details)
    return folder


def echo_repository(folder: Path, max_batch_size: int = 4, **options: Any) -> Path:
    """Render a repository of a hand-made CPU engine and put the echo engine in the slot of the real one."""
    limits = {"max_batch_size": max_batch_size}
    engine = engine_folder(folder / "engine", cpu=True, limits={"max_input_len": 512, "max_seq_len": 2048} | limits)
    render(engine, folder / "repository", RepositoryOptions(**options))
    version = folder / "repository" / "tensorrt_llm" / "1"
    shutil.rmtree(version)
    version.mkdir()
    shutil.copyfile(Path(__file__).parent / "doubles" / "echo_engine.py", version / "model.py")
    return folder / "repository"
