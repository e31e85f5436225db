"""A checkpoint of ours in the hands of TensorRT-LLM: does it load it, read the same config, make the same codes?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitron.artifacts import verify
from minitron.checks import SKIPPED, Check, judge
from minitron.errors import CheckpointError, ToolError
from minitron_build.checkpoint.plan import PlannedTensor, Rule, plan_rank
from minitron_build.checkpoint.read import Checkpoint
from minitron_build.checkpoint.values import Calculator
from minitron_build.probe.asking import Place, answers, failed
from minitron_build.sources.opening import open_model

_RANK = 0  # ranks differ in the slice they hold, not in how it is quantised


def judge_files(folder: Path) -> list[Check]:
    """``checkpoint.whole``, which needs no TensorRT-LLM."""
    found = verify.verify(folder)
    problems = [f"{one.file} {one.message}" for one in found if one.is_error]
    return [judge("checkpoint.whole", problems, found[0].message)]


def judge_loading(place: Place, folder: Path) -> list[Check]:
    """``checkpoint.loads`` and ``checkpoint.config``."""
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        with answers(place, "load", {"checkpoint": folder}) as told:
            read_back = json.loads((told / "config.json").read_text(encoding="utf-8"))
            ranks = json.loads((told / "loaded.json").read_text(encoding="utf-8"))["ranks"]
    except ToolError as error:
        return [judge("checkpoint.loads", [failed(error, place.log)], ""),
                Check("checkpoint.config", SKIPPED, "TensorRT-LLM did not load the checkpoint")]  # fmt: skip
    return [
        judge("checkpoint.loads", [], f"{ranks} of {ranks} ranks"),
        judge("checkpoint.config", config_problems(ours, read_back), f"{len(ours)} keys read back as written"),
    ]


def config_problems(ours: Mapping[str, Any], read_back: Mapping[str, Any], where: str = "") -> list[str]:
    """Keys of our config that TensorRT-LLM reads as something else; keys that it adds are its own."""
    problems = []
    for key, value in ours.items():
        if key not in read_back:
            problems.append(f"{where}{key} is not read back, and {value!r} was written")
        elif isinstance(value, dict) and isinstance(read_back[key], dict):
            problems += config_problems(value, read_back[key], f"{where}{key}.")
        elif read_back[key] != value:
            problems.append(f"{where}{key} is read as {read_back[key]!r}, and {value!r} was written")
    return problems


def judge_codes(place: Place, folder: Path, model: str, revision: str | None) -> list[Check]:
    """``checkpoint.codes`` and ``checkpoint.scales``: every linear weight of the first and the last layer."""
    with Checkpoint.open(folder) as checkpoint:
        if not checkpoint.quantized:
            reason = f"a {checkpoint.precision.value} checkpoint without codes"
            return [Check(name, SKIPPED, reason) for name in ("checkpoint.codes", "checkpoint.scales")]
        if checkpoint.spec.group_size or checkpoint.precision.has_eight_bit_activations:
            reason = "codes in groups are laid out when an engine is built"
            return [Check(name, SKIPPED, reason) for name in ("checkpoint.codes", "checkpoint.scales")]
        planned = _chosen(checkpoint)
        with tempfile.TemporaryDirectory(prefix="minitron-probe-") as scratch:
            _write_weights(Path(scratch), checkpoint, planned, model, revision)
            try:
                with answers(place, "quantise", {"weights": Path(scratch)}) as told:
                    codes = [_difference(checkpoint, one.name, told / f"{one.name}.codes") for one in planned]
                    scales = [
                        _difference(checkpoint, _scales(one.name), told / f"{one.name}.scales") for one in planned
                    ]
            except ToolError as error:
                return [
                    judge("checkpoint.codes", [failed(error, place.log)], ""),
                    Check("checkpoint.scales", SKIPPED, "TensorRT-LLM did not quantise"),
                ]
    names = f"{len(planned)} matrices of the first and the last layer"
    return [
        judge("checkpoint.codes", [one for one in codes if one], f"{names}, byte for byte"),
        judge("checkpoint.scales", [one for one in scales if one], f"{names}, bit for bit"),
    ]


def _chosen(checkpoint: Checkpoint) -> list[PlannedTensor]:
    planned = [one for one in plan_rank(checkpoint.spec, _RANK) if one.rule is Rule.CODES]
    layers = sorted({_layer(one.name) for one in planned})
    return [one for one in planned if _layer(one.name) in (layers[0], layers[-1])]


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _scales(name: str) -> str:
    return name.removesuffix("weight") + "per_channel_scale"


def _write_weights(
    folder: Path, checkpoint: Checkpoint, planned: list[PlannedTensor], model: str, revision: str | None
) -> None:
    """The matrices before quantisation, rounded to the checkpoint's dtype, in the form that ``inside.py`` reads."""
    source = open_model(model, revision)
    try:
        calculator = Calculator(checkpoint.spec, source.tensors())
        for one in planned:
            (folder / one.name).write_bytes(calculator.rows(one, 0, one.rows).tobytes())
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.folder} is not a checkpoint of {model}: that lacks {error}") from None
    finally:
        source.close()
    asked = {"dtype": checkpoint.dtype, "bits": checkpoint.precision.weight_bits,
             "matrices": {one.name: [one.rows, one.columns] for one in planned}}  # fmt: skip
    (folder / "weights.json").write_text(json.dumps(asked), encoding="utf-8")
    folder.chmod(0o755)


def _difference(checkpoint: Checkpoint, name: str, theirs: Path) -> str | None:
    """What differs between a tensor's bytes and those that TensorRT-LLM made."""
    stored = checkpoint.array(name, _RANK)
    ours, found = stored.reshape(-1).view(np.uint8), np.fromfile(theirs, np.uint8)
    if ours.size != found.size:
        return f"{name} has {ours.size:,} bytes, and TensorRT-LLM makes {found.size:,}"
    places = np.flatnonzero(ours != found)
    if not places.size:
        return None
    first = int(places[0])
    return (
        f"{name} differs in {places.size:,} of {ours.size:,} bytes, first at byte {first} "
        f"(ours {ours[first]}, TensorRT-LLM's {found[first]})"
    )
