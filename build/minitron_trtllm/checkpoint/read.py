"""Read a TensorRT-LLM checkpoint: ours, the official converter's, or any other of the same form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy.typing as npt

from minitron_trtllm.errors import CheckpointError
from minitron_trtllm.precision import DTYPES, Precision
from minitron_trtllm.shape import ModelShape
from minitron_trtllm.source.safetensors import Entry, SafetensorsFile


class Checkpoint:
    """An open checkpoint folder; a context manager, and safe to read from several threads.

    ``config`` is its config.json; ``shape``, ``dtype`` ("float16" or "bfloat16", of everything that is not a code),
    ``precision``, ``tp`` and ``pp`` are what that says. ``quantized`` tells whether the linear weights are stored as
    codes: a weight-only checkpoint whose weights are still floats is to be quantised when an engine is built from it.
    """

    def __init__(self, folder: Path, config: dict[str, Any], ranks: list[SafetensorsFile]) -> None:
        self.folder, self.config, self._ranks = folder, config, ranks
        where = folder / "config.json"
        self.shape = _shape(config, where)
        self.dtype: str = _one_of(config, "dtype", DTYPES, where)
        self.precision = _precision(config, self.dtype, where)
        mapping = config.get("mapping") or {}
        self.tp, self.pp = int(mapping.get("tp_size", 1)), int(mapping.get("pp_size", 1))

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Open ``folder`` and check that its files belong together; raises CheckpointError."""
        folder = Path(folder)
        config = _load(folder / "config.json")
        mapping = config.get("mapping") or {}
        world = mapping.get("world_size", 1) if isinstance(mapping, dict) else None
        if not isinstance(world, int) or not 0 < world <= 1024 or world != _ranks_of(mapping):
            raise CheckpointError(
                f"{folder / 'config.json'}: mapping {mapping!r} makes no sense; convert the model again"
            )
        ranks: list[SafetensorsFile] = []
        try:
            for rank in range(world):
                ranks.append(SafetensorsFile(folder / f"rank{rank}.safetensors", CheckpointError))
            return cls(folder, config, ranks)
        except BaseException:
            for opened in ranks:
                opened.close()
            raise

    @property
    def quantized(self) -> bool:
        """Whether linear weights are stored as int8 or int4 codes with a scale per output channel."""
        return any(entry.dtype == "I8" for entry in self._ranks[0].entries.values())

    def names(self, rank: int = 0) -> list[str]:
        """Names of a rank's tensors, in file order."""
        return list(self._ranks[rank].entries)

    def entry(self, name: str, rank: int = 0) -> Entry:
        """Type, shape and place of a tensor; raises CheckpointError where there is none of that name."""
        try:
            return self._ranks[rank].entries[name]
        except KeyError:
            raise CheckpointError(f"{self._ranks[rank].path} has no tensor {name}; convert the model again") from None

    def array(self, name: str, rank: int = 0) -> npt.NDArray[Any]:
        """A tensor as stored: bfloat16 as ml_dtypes.bfloat16, codes in the layout that ``layout.unpack`` undoes."""
        self.entry(name, rank)
        return self._ranks[rank].rows(name)

    def rows(self, name: str, start: int, stop: int, rank: int = 0) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop`` of a tensor as stored, without reading the others."""
        self.entry(name, rank)
        return self._ranks[rank].rows(name, start, stop)

    def close(self) -> None:
        """Close the files."""
        for rank in self._ranks:
            rank.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there: 'minitron convert MODEL --output {path.parent}' makes it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("architecture") != "NemotronForCausalLM":
        raise CheckpointError(f"{path} is not of a TensorRT-LLM checkpoint of a Nemotron model (key 'architecture')")
    return config


def _ranks_of(mapping: dict[str, Any]) -> int:
    tp, pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
    return tp * pp if isinstance(tp, int) and isinstance(pp, int) else -1


def _one_of(config: dict[str, Any], key: str, known: tuple[str, ...], where: Path) -> str:
    value = config.get(key)
    if value not in known:
        raise CheckpointError(f"{where}: {key} is {value!r}, and one of {', '.join(known)} is needed")
    return str(value)


def _precision(config: dict[str, Any], dtype: str, where: Path) -> Precision:
    quantization = config.get("quantization") or {}
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else quantization
    for precision in (Precision(dtype), Precision.INT8_WEIGHT_ONLY, Precision.INT4_WEIGHT_ONLY):
        if precision.quant_algo == algorithm:
            return precision
    raise CheckpointError(f"{where}: quant_algo {algorithm!r} is not known here; null, W8A16 and W4A16 are")


def _shape(config: dict[str, Any], where: Path) -> ModelShape:
    def size(key: str) -> int:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{where}: {key} is {value!r}, and a whole number above 0 is needed")
        return value

    def number(key: str) -> float:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:
            raise CheckpointError(f"{where}: {key} is {value!r}, and a number above 0 is needed")
        return float(value)

    return ModelShape(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        num_kv_heads=size("num_key_value_heads"),
        max_positions=size("max_position_embeddings"),
        norm_epsilon=number("norm_epsilon"),
        rotary_share=number("rotary_pct"),
        rotary_base=number("rotary_base"),
        tied_embeddings=False,
        dtype=config.get("dtype"),
    )
