"""The sides of ``bench_cpu`` that run this project: a process with the bare pipeline, and ``minitron serve`` of this
tree or of another commit's. llama.cpp's are in ``llama_cpp_side``, torch's in ``torch_side``.

Each has a ``name``, ``load_s`` from the start of its process to its first token, ``memory`` (a ``MemoryWatch``) and
``ask(prompts, tokens)``: all prompts at once, so many tokens for each; the answer has ``ttft_s`` of the first token of
any, ``seconds`` to the last, and ``tokens``.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import source_tree
from minitron_serve import minitron_serve
from process_memory import ASKING_S, LOADING_S, MemoryWatch

#: Times that a server is started before the bench gives up: Triton's Python backend at times fails to lock its shared
#: memory (boost::interprocess::lock_exception), the more so the more processes a model has and the busier the machine.
_STARTS = 3


class Side(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...
    @property
    def load_s(self) -> float: ...
    @property
    def memory(self) -> MemoryWatch: ...
    def ask(self, prompts: list[str], tokens: int) -> dict[str, Any]: ...


class Child:
    """A child process with an engine; a line of JSON goes in for each measurement, and one comes out."""

    def __init__(self, name: str, child: subprocess.Popen[str], began: float) -> None:
        """``began``: when it was started; it is loaded when it has printed its first line."""
        self.name, self._child = name, child
        self.memory = MemoryWatch(child.pid)
        with self.memory.watching(LOADING_S):
            self._read()
        self.load_s = time.perf_counter() - began

    def ask(self, prompts: list[str], tokens: int) -> Any:
        assert self._child.stdin is not None
        with self.memory.watching(ASKING_S):
            print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._child.stdin, flush=True)
            return self._read()

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, f"the process of {self.name} ended"
        return json.loads(line)


@contextmanager
def child(name: str, script: str, *words: object, python: Path = Path(sys.executable)) -> Iterator[Child]:
    """The side ``name``, loaded and warm, in a process of its own that runs ``script``."""
    argv = [str(python), script, *map(str, words)]
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Child(name, process, began)
    finally:
        process.kill()
        process.wait()


def bare(engine: Path, kv_tokens: int) -> AbstractContextManager[Child]:
    """The bare pipeline, loaded and warm, in a process of its own."""
    return child("bare", __file__, engine, kv_tokens)


class Server:
    """``minitron serve``, spoken to as a client speaks to it: text in, streamed text out."""

    def __init__(self, name: str, memory: MemoryWatch, url: str, load_s: float) -> None:
        import tritonclient.grpc as triton

        self.name, self.memory, self.load_s = name, memory, load_s
        self._clients = [(triton.InferenceServerClient(url), queue.SimpleQueue[Any]()) for _ in range(64)]
        self._open = 0

    def ask(self, prompts: list[str], tokens: int) -> dict[str, Any]:
        """All prompts at once, a stream each; counts what the responses say they carry."""
        while self._open < len(prompts):
            client, arrived = self._clients[self._open]
            client.start_stream(lambda result, error, into=arrived: into.put((time.perf_counter(), result, error)))
            self._open += 1
        with self.memory.watching(ASKING_S):
            began = time.perf_counter()
            for (client, _), text in zip(self._clients, prompts, strict=False):
                client.async_stream_infer("tensorrt_llm_bls", _inputs(text, tokens), enable_empty_final_response=True)
            parts = [part for _, arrived in self._clients[: len(prompts)] for part in _until_final(arrived)]
        counted = [(moment, int(result.as_numpy("num_output_tokens").sum())) for moment, result in parts]
        first = min(moment for moment, count in counted if count)
        last = max(moment for moment, _ in counted)
        return {"ttft_s": first - began, "seconds": last - began, "tokens": sum(count for _, count in counted)}

    def close(self) -> None:
        """End the streams: the base's server waits for them before it ends."""
        for client, _ in self._clients:
            client.close()


@contextmanager
def server(name: str, repository: Path, work: Path, tree: Path = source_tree.ROOT) -> Iterator[Server]:
    """``minitron serve`` of a source tree on free ports, ready and warm; its state and log go into ``work``."""
    watches: list[MemoryWatch] = []

    def watching(pid: int) -> AbstractContextManager[None]:
        watches.append(MemoryWatch(pid))
        return watches[-1].watching(LOADING_S)

    with ExitStack() as stack:
        for left in reversed(range(_STARTS)):
            began = time.perf_counter()
            try:
                _, state = stack.enter_context(minitron_serve(repository, work, tree, while_loading=watching))
                break
            except AssertionError as error:
                if not left:
                    raise
                print(f"{name} is started again: {error}", file=sys.stderr)
        with closing(Server(name, watches[-1], state["urls"]["grpc"], time.perf_counter() - began)) as side:
            yield side


def _inputs(text: str, tokens: int) -> list[Any]:
    import numpy as np
    import tritonclient.grpc as triton

    values = {
        "text_input": np.array([[text.encode()]], dtype=object),
        "max_tokens": np.array([[tokens]], np.int32),
        "min_tokens": np.array([[tokens]], np.int32),  # no end token before the last
        "stream": np.array([[True]]),
        "return_num_output_tokens": np.array([[True]]),
    }
    kinds = {"O": "BYTES", "i": "INT32", "b": "BOOL"}
    inputs = []
    for name, value in values.items():
        tensor = triton.InferInput(name, list(value.shape), kinds[value.dtype.kind])
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    return inputs


def _until_final(arrived: Any) -> Iterator[tuple[float, Any]]:
    """The responses that carry outputs, with their moments."""
    final = False
    while not final:
        moment, result, error = arrived.get(timeout=900)
        assert error is None, error
        raw = result.get_response()
        final = raw.parameters["triton_final_response"].bool_param
        if any(item.name == "num_output_tokens" for item in raw.outputs):
            yield moment, result


def main() -> int:
    """The child of ``bare``: the pipeline exactly as the CPU engine opens it, and the plainest loop around it."""
    from tokenizers import Tokenizer

    from minitron_triton.models.tensorrt_llm import pipeline
    from minitron_triton.models.tensorrt_llm.engine_config import EngineConfig
    from minitron_triton.models.tensorrt_llm.generation_request import Request

    engine = EngineConfig.read(Path(sys.argv[1]))
    blocks = pipeline.kv_blocks(engine, int(sys.argv[2]))
    opened = pipeline.open_pipeline(engine, kv_blocks=blocks, reuse_kv_cache=True)
    tokenizer = Tokenizer.from_file(str(engine.folder / "tokenizer" / "tokenizer.json"))
    _generate(opened, [Request([0, 0], 2)], 0)
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin, 1):
        asked = json.loads(line)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked["prompts"]]
        print(json.dumps(_generate(opened, [Request(prompt, asked["tokens"]) for prompt in ids], number)), flush=True)
    return 0


def _generate(opened: Any, requests: list[Any], number: int) -> dict[str, Any]:
    from minitron_triton.models.tensorrt_llm import pipeline

    began = time.perf_counter()
    handles = [
        opened.add_request(1000 * number + index, pipeline.input_ids(request), pipeline.generation_config(request))
        for index, request in enumerate(requests)
    ]
    tokens, first = 0, 0.0
    while opened.has_non_finished_requests():
        opened.step()
        for handle in handles:
            while handle.can_read():
                tokens += sum(len(part.generated_ids) for part in handle.read().values())
                first = first or time.perf_counter()
    return {"ttft_s": first - began, "seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
