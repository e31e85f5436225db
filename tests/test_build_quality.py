"""``minitron eval``. The judges: transformers' perplexity (data/quality/transformers.json), closed forms, scipy-free
sums in float64, and the order that precisions must have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA, SMALL_MODEL, minitron
from minitron.errors import EngineError, InputError, UsageError, VerdictError
from minitron_build.evaluate.compare import compare
from minitron_build.evaluate.measures import Window, figures, log_probabilities, nucleus

TRANSFORMERS = json.loads((DATA / "quality" / "transformers.json").read_text(encoding="utf-8"))


def test_perplexity_equals_transformers_and_divergence_orders_the_precisions(
    held_out: Path, small_checkpoint: Callable[[str], Path], small_engine: Callable[[str], Path]
) -> None:
    report = compare(
        str(SMALL_MODEL),
        [str(small_engine("bfloat16")), *(str(small_checkpoint(f"{kind}_weight_only")) for kind in ("int8", "int4"))],
        held_out,
        context=TRANSFORMERS["context"],
        tokens=TRANSFORMERS["tokens"],
    )
    for row, precision in zip(
        [report.reference, *report.candidates], ("bfloat16", "bfloat16", "int8", "int4"), strict=True
    ):
        assert row["perplexity"] == pytest.approx(TRANSFORMERS["perplexity"][precision], rel=1e-3), precision
    same, int8, int4 = report.candidates
    assert same["mean_kl"] == 0
    assert same["top1_agreement"] == 1
    assert 1e-5 < int8["mean_kl"] < int4["mean_kl"] / 10
    assert int4["top1_agreement"] < int8["top1_agreement"] < 1
    assert int4["bytes"] < int8["bytes"] < report.reference["bytes"]
    assert report.complete


def test_a_gguf_file_is_measured_like_any_other(held_out: Path) -> None:
    path = DATA / "gguf" / "tiny-Q8_0.gguf"
    report = compare(str(path), [str(path)], held_out, tokens=200, context=100)
    assert report.reference["bytes"] == path.stat().st_size
    assert report.candidates[0]["mean_kl"] == 0
    assert report.reference["tokens"] == 198  # two windows, whose first tokens nothing predicts


def test_figures_of_known_distributions() -> None:
    """Against the definitions, in float64."""
    pick = np.random.default_rng(3)
    logits = pick.normal(0, 3, (2, 50, 17)).astype(np.float32)
    ids = pick.integers(0, 17, 50)
    reference, candidate = (
        np.exp(rows) / np.exp(rows).sum(axis=-1, keepdims=True) for rows in logits.astype(np.float64)
    )
    nats = (reference * np.log(reference / candidate)).sum(axis=-1)
    windows = [Window(), Window()]
    rows = log_probabilities(logits[0]), log_probabilities(logits[1])
    for window, part in ((0, slice(0, 20)), (0, slice(20, 30)), (1, slice(30, 50))):
        windows[window].add(rows[1][part], ids[part], rows[0][part])
    found = figures(windows)
    assert found["tokens"] == 50
    assert found["perplexity"] == pytest.approx(math.exp(-np.log(candidate[np.arange(50), ids]).mean()), rel=1e-5)
    assert found["mean_kl"] == pytest.approx(nats.mean(), rel=1e-4)
    assert found["p99_kl"] == pytest.approx(np.percentile(nats, 99), rel=1e-4)
    assert found["mean_kl_standard_error"] == pytest.approx(nats.std() / math.sqrt(50), rel=1e-4)
    assert found["top1_agreement"] == (reference.argmax(-1) == candidate.argmax(-1)).mean()
    sets = [[_nucleus(row) for row in rows] for rows in (reference, candidate)]
    assert found["top_p_agreement"] == np.mean([one == other for one, other in zip(*sets, strict=True)])


def _nucleus(row: Any) -> set[int]:
    """By its definition (Holtzman et al., arXiv 1904.09751): the smallest set whose probabilities reach 0.9."""
    chosen: set[int] = set()
    while row[list(chosen)].sum() < 0.9:
        chosen.add(max(set(range(len(row))) - chosen, key=lambda token: row[token]))
    return chosen


def test_near_certainty_and_its_opposite_have_their_nucleus() -> None:
    certain, flat = np.full(1000, -20.0, np.float32), np.full(1000, -math.log(1000), np.float32)
    certain[7] = -1e-6
    assert nucleus(certain) == {7}
    assert len(nucleus(flat)) in (900, 901)  # float32 sums


def test_limit_gates_with_an_exit_code_and_json_is_one_document(
    held_out: Path, small_checkpoint: Callable[[str], Path]
) -> None:
    candidate = small_checkpoint("int4_weight_only")
    words: list[str | Path] = ["eval", candidate, "--reference", SMALL_MODEL, "--text", held_out,
                               "--tokens", "300", "--json", "--max-kl"]  # fmt: skip
    failed = minitron(*words, "1e-9", check=False)
    assert failed.returncode == VerdictError.exit_code
    assert "1e-09" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert json.loads(failed.stdout)["candidates"][0]["mean_kl"] > 1e-9
    passed = json.loads(minitron(*words, "100").stdout)
    assert passed["complete"] is True
    assert passed["text"]["tokens"] == 300


def test_what_cannot_be_measured_is_refused(
    held_out: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, int8 = str(SMALL_MODEL), str(small_checkpoint("int8_weight_only"))
    with pytest.raises(UsageError, match="quantised"):
        compare(int8, [model], held_out)
    with pytest.raises(UsageError, match="not the same model"):
        compare(model, [str(DATA / "gguf" / "tiny-Q8_0.gguf")], held_out, tokens=50)
    with pytest.raises(UsageError, match="--context 4096"):
        compare(model, [int8], held_out, context=4096)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        compare(model, [int8], tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(InputError, match="at least 2"):
        compare(model, [int8], tmp_path / "short.txt")
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "config.json").write_text('{"build_config": {}, "pretrained_config": {}}')
    with pytest.raises(EngineError, match="--target cpu"):
        compare(str(tmp_path / "gpu"), [int8], held_out)
