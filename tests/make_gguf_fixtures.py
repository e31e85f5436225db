"""Have llama.cpp itself run the GGUF files that tests write, and make some itself: writes tests/data/gguf.

Needs the extra ``reference`` with Python 3.11 (torch, llama.cpp), and is run when a model or the writer changes::

    PYTHONPATH=models:tests:core:build .venv-reference/bin/python tests/make_gguf_fixtures.py

``runs.json``: greedy ids of transformers on the small Minitron's own weights in float32, the hashes of the files that
``gguf_files.py`` writes of it, and llama.cpp's greedy ids from each. Nothing is written unless those of the F32 files
equal transformers'. ``tiny-*.gguf`` are a random model of one layer, converted and quantised by llama.cpp, and
``tiny.json`` holds what llama.cpp answers from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import gguf_files
import llama_cpp
import random_model
from answers import SMALL_MODEL, Answers
from make_fixtures import greedy, transformers_model
from minitron.model import shape
from nemotron_reference import source_weights

FOLDER = Path(__file__).parent / "data" / "gguf"
POSITIONS = 32
#: (type, parts) of the files that tests write of the small Minitron.
WRITTEN = (("F32", 1), ("F32", 3), ("BF16", 1), ("BF16", 2), ("F16", 1))
QUANTISED = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q2_K")
TINY = dataclasses.replace(
    random_model.SHAPES["tiny"], vocab_size=300, hidden_size=256, intermediate_size=256, num_layers=1,
    max_positions=256,
)  # fmt: skip
TINY_PROMPTS, TINY_LENGTH = 8, 64


def main() -> int:
    """Make the files named ("runs", "tiny"; both if none is), or say which answer of llama.cpp's is not the model's."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MAKERS:
        with tempfile.TemporaryDirectory() as scratch:
            (FOLDER / f"{name}.json").write_text(_text(MAKERS[name](Path(scratch))), encoding="utf-8")
    return 0


def _written(scratch: Path) -> dict[str, object]:
    prompts = Answers.load("small").prompts
    model = transformers_model(shape.read(SMALL_MODEL / "config.json"), source_weights(SMALL_MODEL))
    wanted = [greedy(model, prompt)[0][:POSITIONS] for prompt in prompts]
    files = []
    for kind, parts in WRITTEN:
        path = gguf_files.write_model(SMALL_MODEL, scratch, kind, parts)
        loaded = llama_cpp.LlamaCpp(path)
        found = [loaded.greedy(prompt, POSITIONS) for prompt in prompts]
        if kind == "F32" and found != wanted:
            raise SystemExit(f"error: llama.cpp's greedy ids from {path.name} are not transformers'")
        hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in gguf_files.file_and_parts(path)]
        files.append({"type": kind, "parts": parts, "sha256": hashes, "greedy": found})
    return {"prompts": prompts, "greedy": wanted, "files": files}


def _tiny(scratch: Path) -> dict[str, object]:
    source = scratch / "tiny"
    random_model.write_random_model(source, TINY, seed=5, tokenizer=False)
    for name in ("tokenizer.model", "tokenizer_config.json"):  # the converter takes the first pieces of it
        shutil.copyfile(SMALL_MODEL / name, source / name)
    llama_cpp.convert(source, scratch / "tiny-f32.gguf", "f32")
    pick = np.random.default_rng(6)
    prompts = pick.integers(4, TINY.vocab_size, (TINY_PROMPTS, TINY_LENGTH)).tolist()
    best, gaps = {}, {}
    for kind in QUANTISED:
        path = FOLDER / f"tiny-{kind}.gguf"
        llama_cpp.quantise(scratch / "tiny-f32.gguf", path, kind)
        loaded = llama_cpp.LlamaCpp(path)
        logits = np.stack([loaded.logits(prompt) for prompt in prompts])
        order = np.sort(logits, axis=-1)
        best[kind] = logits.argmax(axis=-1).tolist()
        gaps[kind] = np.round(order[..., -1] - order[..., -2], 4).tolist()
    return {"prompts": prompts, "best": best, "gaps": gaps}


def _text(content: object) -> str:
    return json.dumps(content).replace("], [", "],\n[") + "\n"


MAKERS = {"runs": _written, "tiny": _tiny}

if __name__ == "__main__":
    sys.exit(main())
