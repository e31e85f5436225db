"""How far activations reach and what float16 makes of them. The judge is numpy's Nemotron (nemotron_reference.py).

The loud model is the small Minitron with one layer's mlp.fc times 64 and its mlp.proj over 64 squared: powers of two,
so that in bfloat16 it says exactly what the small one says, by way of larger numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import nemotron_reference
from conftest import SMALL_MODEL, minitron_here
from minitron.model import activations, shape
from minitron.model.activations import FC_MAX, Activations
from minitron_build.evaluate.compare import compare

LOUD, FACTOR, TOKENS = 1, 64, 200
#: 255.875 is a float16 whose square is one; the next float16, 256, squares to infinity.
assert np.isfinite(np.float16(255.875) ** 2) and np.float16(255.875) < FC_MAX < np.float16(256)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(SMALL_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    for name, factor in (("up_proj", FACTOR), ("down_proj", FACTOR**-2)):
        key = f"model.layers.{LOUD}.mlp.{name}.weight"
        weights[key] = (weights[key].astype(np.float32) * factor).astype(ml_dtypes.bfloat16)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def measured(loud: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of the loud model."""
    path = tmp_path_factory.mktemp("measured") / "activations.json"
    code, out, err = minitron_here("eval", "--reference", loud, "--text", held_out, "--tokens", str(TOKENS),
                                   "--activations", path)  # fmt: skip
    assert code == 0, err
    assert f"layer {LOUD}: mlp.fc reaches" in out and "take bfloat16" in out
    return path


def by_numpy(model: Path, held_out: Path) -> dict[str, list[float]]:
    """Largest magnitudes of each layer by numpy, of the weights as they are stored."""
    own = shape.read(model / "config.json")
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(held_out.read_text(), add_special_tokens=False).ids
    found = {kind: [0.0] * own.num_layers for kind in activations.KINDS}

    def seen(kind: str, layer: int, values: nemotron_reference.Array) -> None:
        found[kind][layer] = max(found[kind][layer], float(np.abs(values).max()))

    weights = nemotron_reference.source_weights(model)
    nemotron_reference.logits(weights, own, np.array(ids[: TOKENS - 1], np.int64), seen)
    return found


def test_they_are_those_of_numpy_layer_by_layer(loud: Path, held_out: Path, measured: Path) -> None:
    found, judge = activations.read(measured), by_numpy(loud, held_out)
    for kind in activations.KINDS:
        assert getattr(found, kind) == pytest.approx(judge[kind], rel=2e-3), kind
    assert judge["fc"][LOUD] > 255.9 and all(value < 255.9 for i, value in enumerate(judge["fc"]) if i != LOUD)
    assert [line.partition(":")[0] for line in found.overflows()] == [f"layer {LOUD}"]


def test_the_small_minitron_itself_stays_in_float16(held_out: Path) -> None:
    report = compare(str(SMALL_MODEL), [], held_out, tokens=TOKENS)
    assert Activations.of(report.reference["activations"], "it").overflows() == []


def test_convert_and_plan_warn_of_float16_and_not_of_bfloat16(
    loud: Path, measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for precision, warned in (("float16", True), ("bfloat16", False)):
        flags = ("--precision", precision, "--activations", measured)
        code, _, err = minitron_here("convert", loud, "--output", tmp_path / precision, *flags)
        assert code == 0 and (f"layer {LOUD}: mlp.fc reaches" in caplog.text) == warned, err
        caplog.clear()
        code, out, err = minitron_here("plan", "--model", loud, "--target", "a100-80gb", *flags)
        assert code == 0 and (f"layer {LOUD}: mlp.fc reaches" in out) == warned, err
        # The checkpoint carries the measurement to the plan of its engine.
        words = ("build", tmp_path / precision, "--target", "a100-80gb", "--dry-run")
        kept = json.loads((tmp_path / precision / "manifest.json").read_text())["details"]["activations"]
        assert kept["layers"][LOUD]["fc"] > 255.9
        assert minitron_here(*words)[0] == 0


def test_float16_that_was_not_measured_is_said(tmp_path: Path) -> None:
    code, out, err = minitron_here("plan", "--recipe", "a100-float16", "--model", SMALL_MODEL)
    assert code == 0 and "were not measured" in out, err
    code, out, err = minitron_here("plan", "--recipe", "a100-bfloat16", "--model", SMALL_MODEL)
    assert code == 0 and "NOTE" not in out, err


def test_a_measurement_of_other_weights_is_refused(measured: Path, tmp_path: Path) -> None:
    code, _, err = minitron_here("convert", SMALL_MODEL, "--output", tmp_path / "out", "--activations", measured)
    assert code == 2 and "measured of other files" in err
    assert not (tmp_path / "out").exists()


def test_the_cpu_engine_shows_what_float16_would_do(loud: Path, held_out: Path, tmp_path: Path) -> None:
    """With ``--overflow float16`` the loud model's engine has infinities, the small one's nothing that differs."""
    for name, model in (("loud", loud), ("small", SMALL_MODEL)):
        assert minitron_here("convert", model, "--output", tmp_path / name)[0] == 0
        flags = ("--target", "cpu", "--overflow", "float16", "--output", tmp_path / f"{name}-engine")
        assert minitron_here("build", tmp_path / name, *flags)[0] == 0
    report = compare(
        str(loud), [str(tmp_path / "loud-engine"), str(tmp_path / "small-engine")], held_out, tokens=TOKENS
    )
    loudly, small = report.candidates
    assert np.isnan(loudly["mean_kl"]) and report.worst() is loudly
    assert loudly["precision"].endswith("float16's overflow")
    peaks = Activations.of(loudly["activations"], "it")
    assert peaks.fc[LOUD] > 255.9 and not np.isfinite(peaks.proj[LOUD]) and np.isfinite(peaks.proj[LOUD - 1])
    assert small["mean_kl"] == pytest.approx(0, abs=1e-6)
