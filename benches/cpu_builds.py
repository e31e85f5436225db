"""What ``bench_cpu`` makes before it measures: models, checkpoints and GGUF files, which stay in its work folder, and
engines with their repositories, which do not. The base's stand in a folder of their own there, beside its tree.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_gguf
import source_tree
from cpu_workload import Workload

from minitron import recipe
from minitron.machine import cpu_memory

_ALLOWED_BYTES = 300_000_000  # what the bar of private memory allows beside weights and KV cache


@dataclass(frozen=True)
class Built:
    """An engine and its repository, made by one source tree."""

    tree: Path
    engine: Path
    repository: Path
    report: dict[str, Any]

    @property
    def weight_bytes(self) -> int:
        """Size of the file that is mapped."""
        return (self.engine / "openvino" / "openvino_model.bin").stat().st_size

    @property
    def head(self) -> str:
        """The kind of its output head."""
        return str(self._config()["cpu"]["lm_head"])

    def kv_bytes(self, workload: Workload) -> int:
        """Size of its KV cache."""
        return cpu_memory.read(self.engine).kv_bytes(workload.kv_tokens)

    def float16_kv_bytes(self, tokens: int) -> int:
        """What keys and values of so many tokens take in float16."""
        return 2 * tokens * self._kv_elements()

    def _kv_elements(self) -> int:
        model = self._config()["pretrained_config"]
        return int(2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_size"])

    def expected_private_bytes(self, workload: Workload) -> dict[str, int]:
        """What private memory should be: what a step multiplies with, the KV cache, and a rest."""
        weights = cpu_memory.read(self.engine).weight_bytes
        return {"weights": weights, "kv_cache": self.kv_bytes(workload), "other": _ALLOWED_BYTES}

    def remove(self) -> None:
        """Remove both folders."""
        shutil.rmtree(self.repository)
        shutil.rmtree(self.engine)

    def _config(self) -> Any:
        return json.loads((self.engine / "config.json").read_text(encoding="utf-8"))


class Maker:
    """Makes them in ``work``, by this tree and, where ``base`` is a commit, by that one's."""

    def __init__(self, work: Path, base: str | None, workload: Workload) -> None:
        self._work, self._base, self._workload = work, base, workload

    def checkpoint(self, precision: str) -> Path:
        """This tree's; made where it is not there. The base's engines are of it too: the format is TensorRT-LLM's."""
        place = self._work / f"{self._workload.model.name}-{precision}"
        if not place.exists():
            source_tree.run(
                source_tree.ROOT, "convert", self._workload.model, "--output", place, "--precision", precision
            )
        return place

    def gguf(self, precision: str) -> Path | None:
        """llama.cpp's file of the same weights; None where it has no such kind."""
        kind = peer_gguf.KINDS.get(precision)
        return peer_gguf.gguf(self._workload.model, kind, self._work) if kind else None

    def engines(self, precision: str, execution: str, head: str, speculation: str) -> list[Built]:
        """This tree's engine with that head and, where there is one, the base's with the head that it chooses."""
        checkpoint = self.checkpoint(precision)
        asked = {recipe.environment_name("serving.speculation"): speculation}
        if head != "default":
            asked[recipe.environment_name("cpu.lm_head")] = head
        made = [self._build(source_tree.ROOT, self._work, checkpoint, execution, asked)]
        if self._base:
            work = self._work / f"base-{self._base[:12]}"
            work.mkdir(exist_ok=True)
            tree = source_tree.checked_out(self._base, work / "tree")
            made.append(self._build(tree, work, checkpoint, execution, {}))
        return made

    def _build(self, tree: Path, work: Path, checkpoint: Path, execution: str, environment: dict[str, str]) -> Built:
        workload = self._workload
        engine, repository = (work / f"{checkpoint.name}{end}" for end in ("-engine", "-repo"))
        for left in (engine, repository):  # by a run that was broken off; one of older code would be found built
            shutil.rmtree(left, ignore_errors=True)
        report = source_tree.run(
            tree, "build", checkpoint, "--target", "cpu", "--output", engine, "--force", "--json",
            "--execution", execution, "--max-batch-size", max(workload.streams), "--max-seq-len", workload.longest,
            "--max-input-len", workload.longest, **environment,
        )  # fmt: skip
        tokens = workload.kv_tokens
        source_tree.run(tree, "render", engine, "--output", repository, "--max-tokens-in-paged-kv-cache", tokens,
                        **environment)  # fmt: skip
        kept = {key: report[key] for key in ("seconds", "peak_memory_bytes", "bytes")}
        return Built(tree, engine, repository, kept)
