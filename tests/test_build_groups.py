"""Four-bit codes in groups against what ModelOpt 0.47.0 exported (``make_modelopt_fixtures.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import modelopt_cases as cases
from minitron.model.precision import Precision
from minitron_build.checkpoint import groups
from minitron_build.checkpoint.calibration import feedback
from minitron_build.checkpoint.calibration.rows import by_rows
from minitron_build.checkpoint.plan import plan_rank
from minitron_build.checkpoint.spec import Spec
from minitron_build.checkpoint.values import Calculator
from minitron_build.checkpoint.write import blocks
from minitron_build.sources.opening import open_model

DATA = Path(__file__).parent / "data" / "modelopt"
INDEX = json.loads((DATA / "index.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_model(tmp_path_factory.mktemp("modelopt") / "model")


class _GivenFactors:
    """Stands for a calibration that found ModelOpt's factors and rounds to nearest, as ModelOpt does."""

    def __init__(self, weights: dict[str, NDArray[np.float32]], folder: Path, group: int) -> None:
        self._weights, self._group = weights, group
        with np.load(folder / "factors.npz") as held:
            self._factors = dict(held)

    def factors(self, tensor: str) -> NDArray[np.float32]:
        return np.asarray(self._factors[tensor])

    def _turned(self, tensor: str) -> NDArray[np.float32]:
        from minitron_build.checkpoint.calibration.search import divided
        from minitron_build.checkpoint.values import DTYPES

        return divided(self._weights[tensor], self.factors(tensor), DTYPES["bfloat16"])

    def scales(self, tensor: str) -> NDArray[np.float32]:
        return groups.scales_of(self._turned(tensor), self._group)

    def codes(self, tensor: str) -> NDArray[np.int8]:
        return groups.pack(groups.quantize(self._turned(tensor), self.scales(tensor)))

    def kv_scale(self, index: int) -> np.float32:
        raise NotImplementedError


def _written(model: Path, spec: Spec, rank: int, calibrated: Any = None) -> dict[str, NDArray[Any]]:
    source = open_model(str(model), None)
    calculator = Calculator(spec, source.tensors(), calibrated=calibrated)
    found: dict[str, NDArray[Any]] = {}
    scales: list[NDArray[Any]] = []
    for planned in plan_rank(spec, rank):
        if planned.rule.name == "SCALES":
            found[planned.name] = np.concatenate(scales)
            continue
        done = [calculator.values(planned, block.start, block.stop) for block in blocks(planned)]
        found[planned.name] = np.concatenate([values.data for values in done]).reshape(planned.shape)
        scales = [values.scales for values in done if values.scales is not None]
    source.close()
    return found


def _same(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> None:
    tables = {"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"}  # which ModelOpt leaves out
    assert set(ours) - tables == set(theirs)
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype and ours[name].shape == wanted.shape, name
        assert ours[name].tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize(("group", "tp"), [(128, 1), (64, 1), (64, 2)])
def test_folding_rounding_and_packing_are_modelopts(group: int, tp: int, model: Path) -> None:
    folder = DATA / f"given_{group}-tp{tp}"
    source = open_model(str(model), None)
    weights = {name: tensor.read(0, tensor.shape[0]).astype(np.float32) for name, tensor in source.tensors().items()}
    source.close()
    # ModelOpt shards the embedding by rows as soon as there is more than one rank, and says so for one rank too.
    spec = Spec(cases.SHAPE, Precision.INT4_AWQ, "bfloat16", tp, use_parallel_embedding=True, group_size=group)
    for rank in range(tp):
        ours = _written(model, spec, rank, _GivenFactors(weights, folder, group))
        _same(ours, load_file(folder / f"rank{rank}.safetensors"))
    said = INDEX["cases"][f"given_{group}-tp{tp}"]["config"]
    assert spec.config()["quantization"] == said["quantization"]
    assert spec.config()["mapping"] == said["mapping"]


def test_plain_groups_are_modelopts_int4_blockwise(model: Path) -> None:
    spec = Spec(cases.SHAPE, Precision.INT4_WEIGHT_ONLY, "bfloat16", use_parallel_embedding=True, group_size=128)
    _same(_written(model, spec, 0), load_file(DATA / "int4_blockwise-tp1" / "rank0.safetensors"))
    said = INDEX["cases"]["int4_blockwise-tp1"]["config"]["quantization"]
    assert said["pre_quant_scale"] is True  # with no such tensor in the file: TensorRT-LLM does not load it
    assert spec.config()["quantization"] == said | {"pre_quant_scale": False}


def test_packing_is_undone() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (64, 128)).astype(np.int8)
    stored = groups.pack(codes)
    assert stored.shape == (32, 128)
    assert stored[0, 0] & 15 == codes[0, 0] & 15 and stored[0, 0] >> 4 == codes[1, 0]  # the even channel is low
    assert (groups.unpack(stored) == codes).all()


def test_a_group_of_zeros_is_zero() -> None:
    weights = np.zeros((2, 128), np.float32)
    weights[0, 64:] = 1
    scales = groups.scales_of(weights, 64)
    assert (groups.dequantize(groups.quantize(weights, scales), scales) == weights).all()


def test_feedback_costs_less_than_rounding_to_nearest() -> None:
    """The cost is counted here in float64, by its definition; inputs are correlated, as real ones are."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((32, 256)).astype(np.float32)
    inputs = (generator.standard_normal((2048, 64)) @ generator.standard_normal((64, 256))).astype(np.float32)
    inputs += generator.standard_normal(inputs.shape).astype(np.float32)
    scales = groups.scales_of(weights, 128)

    def cost(codes: NDArray[np.int8]) -> float:
        off = groups.dequantize(codes, scales).astype(np.float64) - weights
        return float(np.square(inputs @ off.T).sum())

    plain = groups.quantize(weights, scales)
    found = feedback.quantize(weights, scales, inputs.T @ inputs)
    assert cost(found) < 0.25 * cost(plain)
    # Inputs that have nothing to do with each other leave nothing to make up for.
    assert (feedback.quantize(weights, scales, np.eye(256, dtype=np.float32)) == plain).all()


def test_feedback_makes_the_choice_that_its_definition_asks_for() -> None:
    """The rule of QuIP, written out in float64 on Cholesky's factor of numpy; more inputs than a block has."""
    generator = np.random.default_rng(1)
    weights = generator.standard_normal((6, 640)).astype(np.float32)
    inputs = generator.standard_normal((700, 640)).astype(np.float32)
    gram = inputs.T @ inputs
    scales = groups.scales_of(weights, 128)
    scales[2, 3] = 0
    damped = gram.astype(np.float64) + np.eye(640) * feedback.DAMPING * np.diagonal(gram).mean()
    factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    wanted, errors = np.zeros((6, 640), np.int8), np.zeros((6, 640))
    for place in range(640):
        scale = scales[:, place // 128].astype(np.float64)
        owed = errors[:, :place] @ factor[:place, place] / factor[place, place]
        wanted[:, place] = np.rint((weights[:, place] - owed) / np.where(scale > 0, scale, 1)).clip(-8, 7)
        errors[:, place] = wanted[:, place] * scale - weights[:, place]
    found = feedback.quantize(weights, scales, gram)
    # One code that float32 rounds the other way may change those after it in its row.
    assert (found == wanted).mean() > 0.99


def test_a_gram_matrix_that_float32_cannot_factor_is_damped_until_it_can() -> None:
    """A sum of squares has no negative eigenvalue; float32 makes one now and then, here it is there from the start."""
    gram = np.diag(np.array([1, 1, 1, -0.05], np.float32))
    weights = np.array([[0.4, 0.6, -1, 7]], np.float32)
    assert feedback.quantize(weights, np.ones((1, 1), np.float32), gram).tolist() == [[0, 1, -1, 7]]


def test_rows_on_all_cores_are_those_of_one_go_and_errors_come_through() -> None:
    generator = np.random.default_rng(2)
    matrix, scales = generator.standard_normal((1000, 512)), generator.standard_normal((1000, 4))
    found = by_rows(lambda each, scale: each * scale[:, :1], np.empty((1000, 512), np.float32), matrix, scales)
    assert (found == (matrix * scales[:, :1]).astype(np.float32)).all()
    with pytest.raises(ValueError, match="broadcast"):
        by_rows(lambda each: each[:, :3], np.empty((1000, 512), np.float32), matrix)
