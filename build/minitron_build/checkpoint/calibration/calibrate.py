"""Run a calibration text through a model, layer by layer, and note what a quantised checkpoint needs to know.

Only one layer's weights are in memory; the hidden states of the text wait in a file. What is found of a layer is
written as soon as it is, so that a run that was ended, by whatever, goes on with the next layer. Results are the same
however often that happened: whoever wants them reads them from those files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from minitron import files
from minitron.errors import ModelError, NoSpace
from minitron.model.shape import ModelShape
from minitron.version import VERSION
from minitron_build.checkpoint import groups
from minitron_build.checkpoint.calibration import layer as layers
from minitron_build.checkpoint.calibration.search import Inputs, search
from minitron_build.checkpoint.calibration.text import Ids
from minitron_build.checkpoint.rounding import rounded
from minitron_build.sources.model import EMBEDDING, SourceTensor

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

SAMPLED_ROWS = 512
"""Tokens, evenly over the text, whose inputs a search looks at one by one; of the others it knows sums."""

_ABOUT = "about.json"
_EMBEDDED_AT_ONCE = 1 << 16
_TOKENS_AT_ONCE = 4096
"""Of as many sequences as make so many: larger products, and a sum of x x^T that is added to less often."""

_INT8_LARGEST = np.float32(127)


@dataclass(frozen=True)
class Calibration:
    """What was found, in ``folder``: a file for each layer. Asked for by the names of the source's tensors."""

    folder: Path

    def factors(self, tensor: str) -> Floats:
        """What the inputs of ``tensor`` are multiplied with, [in]."""
        index, module = _place(tensor)
        return np.asarray(self._of(index, f"{module}.factors"))

    def scales(self, tensor: str) -> Floats:
        """The scales of ``tensor``'s groups, [out, in / group]."""
        index, _ = _place(tensor)
        return np.asarray(self._of(index, f"{tensor.split('.', 3)[3]}.scales"))

    def codes(self, tensor: str) -> npt.NDArray[np.int8]:
        """The codes of ``tensor``, packed (``checkpoint.groups``): int8 [out / 2, in]."""
        index, _ = _place(tensor)
        return np.asarray(self._of(index, f"{tensor.split('.', 3)[3]}.codes"))

    def kv_scale(self, index: int) -> np.float32:
        """What a unit of an INT8 key or value of a layer stands for: the largest magnitude / 127."""
        return np.float32(self._of(index, "kv_largest")) / _INT8_LARGEST

    def summary(self, count: int) -> list[dict[str, Any]]:
        """For each of ``count`` layers and each linear module: strength and errors, as JSON values."""
        return [json.loads(str(self._of(index, "found"))) for index in range(count)]

    def _of(self, index: int, name: str) -> Any:
        file = _layer_file(self.folder, index)
        return _read(file, name, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _read(file: Path, name: str, _written_ns: int) -> Any:
    """An array of a layer's file; the last few are kept, since a matrix is asked for in pieces."""
    with np.load(file, allow_pickle=False) as held:
        return held[name]


def _place(tensor: str) -> tuple[int, str]:
    """Layer and linear module of a source tensor."""
    _, _, index, name = tensor.split(".", 3)
    return int(index), next(module for module, names in layers.MODULES.items() if name in names)


def calibrate(
    tensors: Mapping[str, SourceTensor],
    shape: ModelShape,
    ids: Ids,
    folder: Path,
    *,
    dtype: np.dtype[Any],
    group: int | None,
) -> Calibration:
    """Run ``ids`` [sequences, tokens] through the model; keep what is found in ``folder``, go on from what is there.

    Weights are rounded to ``dtype`` first, as in the checkpoint. ``group``: search factors and scales of groups of that
    size (None: only the range of keys and values is looked at). Raises ModelError where the states are not finite,
    NoSpace.
    """
    run = _Run(tensors, shape, ids, folder, dtype, group)
    run.begin()
    started, first = time.monotonic(), run.done()
    if first:
        log.info("calibration: %d of %d layers were done before", first, shape.num_layers)
    for index in range(first, shape.num_layers):
        run.do(index)
        left = (time.monotonic() - started) / (index + 1 - first) * (shape.num_layers - index - 1)
        log.info("calibration: layer %d of %d, %.0f s left", index + 1, shape.num_layers, left)
    return Calibration(folder)


@dataclass(frozen=True)
class _Run:
    tensors: Mapping[str, SourceTensor]
    shape: ModelShape
    ids: Ids
    folder: Path
    dtype: np.dtype[Any]
    group: int | None

    def begin(self) -> None:
        """Make the folder, or empty one of another run."""
        about = json.dumps(self._about(), indent=1)
        kept = self.folder / _ABOUT
        if kept.is_file() and kept.read_text(encoding="utf-8") == about:
            return
        if self.folder.exists():
            log.warning("%s is of another calibration; beginning anew", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        needed = 2 * self.ids.size * self.shape.hidden_size * 4
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise NoSpace(f"{self.folder} needs {needed:,} bytes for hidden states and has {free:,}; calibrate less")
        _keep_states(_states(self.folder, 0), self._embedded())
        files.write_text(kept, about)

    def _about(self) -> dict[str, Any]:
        """What must be the same for layers done earlier to count."""
        sources = {
            str(tensor.file): [os.stat(tensor.file).st_size, os.stat(tensor.file).st_mtime_ns]
            for tensor in self.tensors.values()
        }
        text = hashlib.sha256(self.ids.tobytes()).hexdigest()
        return {
            "toolkit": VERSION, "numpy": np.__version__, "threads": len(os.sched_getaffinity(0)), "files": sources,
            "text": text, "shape": list(self.ids.shape), "dtype": str(self.dtype), "group": self.group,
        }  # fmt: skip

    def done(self) -> int:
        """Layers that are finished: their file is the last thing that is written of one."""
        return next(index for index in range(self.shape.num_layers + 1) if not _layer_file(self.folder, index).exists())

    def do(self, index: int) -> None:
        """One layer: its states after it, then what was found of it; the states before it go."""
        layer = layers.Layer(self.shape, self._weights(index))
        seen = _Statistics(self.ids.size if self.group else 0)
        states = np.load(_states(self.folder, index))
        at_once = max(_TOKENS_AT_ONCE // states.shape[1], 1)
        for start in range(0, len(states), at_once):
            states[start : start + at_once] = layer(states[start : start + at_once], seen)
        if not np.isfinite(states).all():
            raise ModelError(
                f"layer {index} makes hidden states of the calibration text that are not finite; the model is damaged"
            )
        if index + 1 < self.shape.num_layers:
            _keep_states(_states(self.folder, index + 1), states)
        del states
        found = self._found(layer, seen)
        _keep(_layer_file(self.folder, index), lambda file: np.savez(file, allow_pickle=False, **found))
        _states(self.folder, index).unlink()

    def _found(self, layer: layers.Layer, seen: _Statistics) -> dict[str, Any]:
        found: dict[str, Any] = {"kv_largest": seen.kv_largest}
        summary: dict[str, Any] = {}
        if self.group is None:
            return found | {"found": json.dumps(summary)}
        for module, names in layers.MODULES.items():
            weights = np.concatenate([layer.weights[name] for name in names])
            best = search(weights, seen.take_inputs(module), self.group, self.dtype)
            found[f"{module}.factors"] = best.factors
            ends = np.cumsum([len(layer.weights[name]) for name in names])[:-1]
            for name, scales, codes in zip(names, np.split(best.scales, ends), np.split(best.codes, ends), strict=True):
                found |= {f"{name}.scales": scales, f"{name}.codes": groups.pack(codes)}
            summary[module] = {"strength": best.strength, "error": best.error, "plain_error": best.plain_error}
        return found | {"found": json.dumps(summary)}

    def _weights(self, index: int) -> dict[str, Floats]:
        def stored(name: str) -> npt.NDArray[Any]:
            tensor = self.tensors[f"model.layers.{index}.{name}"]
            return tensor.read(0, tensor.shape[0])

        weights = {name: rounded(stored(name), self.dtype) for names in layers.MODULES.values() for name in names}
        for norm in layers.NORMS:
            raised = stored(f"{norm}.weight").astype(self.dtype) + self.dtype.type(1)
            weights[f"{norm}.weight"] = raised.astype(np.float32)
            weights[f"{norm}.bias"] = rounded(stored(f"{norm}.bias"), self.dtype)
        return weights

    def _embedded(self) -> Floats:
        """Rows of the embedding for every token, [sequences, tokens, hidden]; read in pieces."""
        table, states = self.tensors[EMBEDDING], np.empty((*self.ids.shape, self.shape.hidden_size), np.float32)
        for start in range(0, table.shape[0], _EMBEDDED_AT_ONCE):
            stop = min(start + _EMBEDDED_AT_ONCE, table.shape[0])
            here = (self.ids >= start) & (self.ids < stop)
            if here.any():
                states[here] = rounded(table.read(start, stop)[self.ids[here] - start], self.dtype)
        return states


class _Statistics:
    """Sums and samples of what a layer's linear modules are multiplied with, over ``tokens`` in all.

    0 tokens: only the range of keys and values is looked at.
    """

    def __init__(self, tokens: int) -> None:
        self._step = -(-tokens // SAMPLED_ROWS)
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self._samples: dict[str, list[Floats]] = {}
        self._grams: dict[str, Floats] = {}
        self.kv_largest = np.float32(0)

    def __call__(self, name: str, rows: Floats) -> None:
        if name in ("keys", "values"):
            self.kv_largest = max(self.kv_largest, np.abs(rows).max())
        elif self._step:
            before = self._counts.get(name, 0)
            self._counts[name] = before + len(rows)
            self._sums[name] = self._sums.get(name, 0) + np.abs(rows).sum(axis=0, dtype=np.float64)
            self._samples.setdefault(name, []).append(rows[-before % self._step :: self._step].copy())
            gram = rows.T @ rows
            if name in self._grams:
                gram += self._grams[name]
            self._grams[name] = gram

    def take_inputs(self, module: str) -> Inputs:
        """What is known of a module's inputs, once."""
        mean = (self._sums[module] / self._counts[module]).astype(np.float32)
        return Inputs(mean, np.concatenate(self._samples.pop(module)), self._grams.pop(module))


def _keep(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        save(file)
    os.replace(partial, path)


def _keep_states(path: Path, states: Floats) -> None:
    _keep(path, lambda file: np.save(file, states, allow_pickle=False))


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:04d}.npz"


def _states(folder: Path, index: int) -> Path:
    """Hidden states before a layer."""
    return folder / f"states-{index:04d}.npy"
