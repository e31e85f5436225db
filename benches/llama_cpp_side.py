"""llama.cpp as a side of ``bench_cpu``: its server, from the wheel ``xllamacpp``, in a process of its own.

The weights are those of the very Hugging Face folder that the other sides come from, every matrix in Q8_0 or Q4_0 (the
embedding and the head too, which the engine keeps in 16 bits), norms in float32. As llama.cpp comes: a mapped file,
repacked where it has kernels for that, keys and values in float16, flash attention where it likes; one thread for each
core, greedy, without reuse of earlier prompts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cpu_sides
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import gguf_files  # noqa: E402

#: The kind of GGUF that stands beside a precision.
KINDS = {"int8_weight_only": "Q8_0", "int4_weight_only": "Q4_0"}
_PIECE_ELEMENTS = 4 << 20
_SLOT_STEP = 256  # llama.cpp rounds the context of a slot up to this


def gguf(model: Path, kind: str, work: Path) -> Path:
    """The GGUF file of a Hugging Face folder in ``work``, made once; a piece of a tensor in memory at a time."""
    path = work / f"{model.name}-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        sources = _sources(model)
        entries = [_entry(tensor, name, kind) for name, tensor in sources]
        data = (_pieces(tensor, name, kind) for name, tensor in sources)
        gguf_files.write_pieces(partial, gguf_files.metadata_of(model), entries, data)
        partial.rename(path)
    return path


def _sources(model: Path) -> list[tuple[str, Any]]:
    """All tensors by name, as slices that read what is asked for."""
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, "numpy") for path in sorted(model.glob("*.safetensors"))]
    return [(name, file.get_slice(name)) for file in files for name in file.keys()]  # noqa: SIM118 - not a dictionary


def _entry(tensor: Any, name: str, kind: str) -> gguf_files.Entry:
    import gguf as library

    shape = tuple(tensor.get_shape())
    number = library.GGMLQuantizationType[_kind(shape, kind)]
    elements_of_block, bytes_of_block = library.GGML_QUANT_SIZES[number]
    assert shape[-1] % elements_of_block == 0, f"{name}: rows of {shape[-1]} do not fit {kind}"
    size = int(np.prod(shape)) // elements_of_block * bytes_of_block
    return gguf_files.llama_cpp_name(name), shape, int(number), size


def _pieces(tensor: Any, name: str, kind: str) -> Iterator[bytes]:
    import gguf as library

    shape = tensor.get_shape()
    number = library.GGMLQuantizationType[_kind(shape, kind)]
    rows = shape[0] if len(shape) == 1 else max(1, _PIECE_ELEMENTS // shape[1])
    for start in range(0, shape[0], rows):
        values = tensor[start : min(start + rows, shape[0])].astype(np.float32)
        if name.endswith("norm.weight"):
            values = values + np.float32(1)
        yield library.quants.quantize(values, number).tobytes()


def _kind(shape: Any, kind: str) -> str:
    return "F32" if len(shape) == 1 else kind


def llama_cpp(
    path: Path, model: Path, streams: int, longest: int, work: Path
) -> AbstractContextManager[cpu_sides.Child]:
    """llama.cpp's server with a slot of ``longest`` tokens for each stream, loaded and warm; its log is in ``work``."""
    return cpu_sides.child("llama.cpp", __file__, path, model, streams, longest, work / "llama-cpp.log")


def main() -> int:
    """The child: load, then measure what each line asks for."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(sys.argv[2]) / "tokenizer.json"))
    answers = os.fdopen(os.dup(1), "w")
    with open(sys.argv[5], "wb") as log:  # llama.cpp writes to both
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    began = time.perf_counter()
    server = _open(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    _generate(server, [[0, 0]], 2)
    print(json.dumps({"load_s": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked["prompts"]]
        print(json.dumps(_generate(server, ids, asked["tokens"])), file=answers, flush=True)
    return 0


def _open(path: Path, slots: int, longest: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_parallel = slots
    options.n_ctx = slots * (longest // _SLOT_STEP + 1) * _SLOT_STEP
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    options.cache_prompt = False
    options.cache_ram_mib = 0
    return xllamacpp.Server(options)


def _generate(server: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts at once, a thread each; counts the tokens that llama.cpp says it read and made."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as threads:
        streams = list(threads.map(lambda prompt: _stream(server, prompt, tokens), prompts))
    last = [chunks[-1][1] for chunks in streams]
    for prompt, chunk in zip(prompts, last, strict=True):
        assert chunk["timings"]["prompt_n"] == len(prompt), chunk  # the whole prompt, nothing of it cached
    return {
        "ttft_s": min(chunks[0][0] for chunks in streams) - began,
        "seconds": max(chunks[-1][0] for chunks in streams) - began,
        "tokens": sum(chunk["usage"]["completion_tokens"] for chunk in last),
    }


def _stream(server: Any, prompt: list[int], tokens: int) -> list[tuple[float, Any]]:
    """The chunks of one request with their moments: one for each token that ends a character, and a last one."""
    chunks: list[tuple[float, Any]] = []
    server.handle_completions(_request(prompt, tokens), lambda chunk: chunks.append((time.perf_counter(), chunk)))
    assert chunks and "usage" in chunks[-1][1], chunks[-1:]
    return chunks


def _request(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "top_k": 1,
        "cache_prompt": False,
        "stream": True,
    }


if __name__ == "__main__":
    sys.exit(main())
