"""What can be measured: a model, a GGUF file, a checkpoint or a CPU engine; each becomes an engine folder."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.artifacts.manifest import FileRecord
from minitron.errors import EngineError, UsageError
from minitron_build.sources.opening import open_model

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".xml")


@dataclass(frozen=True)
class Candidate:
    """Something to measure, by the ``name`` that the user gave. ``size`` is that of its weights, in bytes.

    ``source``: digest of the model's own files, where that is known.
    """

    name: str
    kind: str
    size: int
    engine: Path
    config: dict[str, Any]
    source: str | None = None

    @property
    def execution(self) -> str:
        """How the engine calculates: "exact" or "fast"."""
        return str(self.config["cpu"]["execution"])

    @property
    def precision(self) -> str:
        """How weights are stored and calculated, in words."""
        model, cpu = self.config["pretrained_config"], self.config["cpu"]
        quantization = model["quantization"]
        stored = quantization["quant_algo"] or model["dtype"]
        plain_groups = stored == "W4A16_AWQ" and not quantization.get("pre_quant_scale")
        parts = [
            (plain_groups, "not calibrated"), (bool(quantization.get("kv_cache_quant_algo")), "8-bit KV cache"),
            (cpu["lm_head"] != "as_is", f"{cpu['lm_head']} head"), (cpu["execution"] == "fast", "fast"),
            (cpu.get("overflow") == "float16", "float16's overflow"),
        ]  # fmt: skip
        return ", ".join([stored, *(name for there, name in parts if there)])

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return int(self.config["pretrained_config"]["vocab_size"])

    @property
    def max_tokens(self) -> int:
        """The longest text that the engine takes at once."""
        return int(self.config["build_config"]["max_seq_len"])

    def description(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        return {"kind": self.kind, "precision": self.precision, "bytes": self.size, "source": self.source}

    def check_reference(self) -> None:
        """Raise UsageError unless this is unquantised and calculates exactly."""
        cpu = self.config["cpu"]
        quantization = self.config["pretrained_config"]["quantization"]
        if quantization["quant_algo"] is not None or quantization.get("kv_cache_quant_algo") is not None:
            raise UsageError(
                f"--reference {self.name} is quantised; take the model, or a float16 or bfloat16 checkpoint"
            )
        if (cpu["execution"], cpu["lm_head"], cpu.get("overflow", "none")) != ("exact", "as_is", "none"):
            raise UsageError(f"--reference {self.name} does not calculate exactly; build it with --execution exact")


def prepare(name: str, scratch: Path) -> Candidate:
    """Convert and build what is not an engine yet, below ``scratch``; raises what those stages raise."""
    from minitron_build.checkpoint.convert import convert
    from minitron_build.engines.openvino import write

    path = Path(name)
    kind = _kind(path)
    size = sum(file.stat().st_size for file in _weights(path))
    if kind == "engine":
        return Candidate(name, kind, size, path, _engine_config(path))
    checkpoint, source = path, None
    if kind == "model":
        done = convert(name, scratch / "checkpoint")
        checkpoint, size, source = done.folder, size or done.source_bytes, done.manifest.input.digest
    elif (path / manifest.NAME).is_file():
        source = manifest.read(path, "checkpoint").input.digest
    write.build(checkpoint, scratch / "engine", write.CpuOptions())
    return Candidate(name, kind, size, scratch / "engine", _engine_config(scratch / "engine"), source)


def digest(name: str) -> str:
    """SHA-256 over the names and hashes of the files that ``name`` stands for; raises ModelError, UsageError."""
    path = Path(name)
    if _kind(path) == "model":
        with contextlib.closing(open_model(name)) as source:
            return _digest(source.files())
    return _digest({file: path / file for file in files.tree_files(path)})


def _digest(paths: dict[str, Path]) -> str:
    return manifest.digest_of({file: FileRecord.of(path) for file, path in paths.items()})


def _kind(path: Path) -> str:
    config = _load(path / "config.json") if path.is_dir() else {}
    if "build_config" in config:
        return "engine"
    return "checkpoint" if "pretrained_config" not in config and "architecture" in config else "model"


def _engine_config(folder: Path) -> dict[str, Any]:
    config = _load(folder / "config.json")
    if not isinstance(config.get("cpu"), dict):
        raise EngineError(f"{folder} is an engine for a GPU; build its checkpoint with --target cpu to measure it here")
    return config


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever opens the folder next says what is wrong with it
    return raw if isinstance(raw, dict) else {}


def _weights(path: Path) -> list[Path]:
    """The files that hold the weights; all parts of a split GGUF file."""
    if path.is_file():
        stem, split, rest = path.name.partition("-00001-of-")
        return list(path.parent.glob(f"{stem}-*-of-{rest}")) if split else [path]
    return [file for file in path.rglob("*") if file.suffix in _WEIGHTS] if path.is_dir() else []
