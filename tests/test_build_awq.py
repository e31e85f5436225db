"""``convert --precision int4_awq`` and ``--kv-cache int8``: what a calibration finds, and that it goes on after a kill.

What quantising costs is measured by the numpy Nemotron of the tests on the weights that a checkpoint holds.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import cpu_engines
import modelopt_cases as cases
from conftest import DATA, ROOMS, ROOT, SMALL_MODEL, minitron_here
from minitron.machine import cpu_execution
from minitron.model import shape
from minitron_build.checkpoint.calibration.calibrate import calibrate
from minitron_build.checkpoint.calibration.layer import Layer
from minitron_build.checkpoint.calibration.text import CalibrationText
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.values import DTYPES
from minitron_build.engines.openvino import write as cpu
from minitron_build.sources.opening import open_model
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation_request import Request
from nemotron_reference import checkpoint_weights, logits

TEXT = DATA / "small_minitron" / "calibration.txt"
SHAPE = shape.read(SMALL_MODEL / "config.json")
CALIBRATION = CalibrationText(TEXT, 32, 256)


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("awq") / "checkpoint"
    convert(SMALL_MODEL, output, precision="int4_awq", calibration=CALIBRATION)
    return output


def _ids(text: str) -> NDArray[np.int64]:
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids)


@functools.cache
def _held_out() -> list[NDArray[np.int64]]:
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    ids = _ids("\n\n".join(chapters))
    return [ids[start : start + 256] for start in range(0, 2560, 256)]


def _log_probs(folder: Path) -> list[NDArray[np.float64]]:
    weights = checkpoint_weights(folder)
    rows = [logits(weights, SHAPE, window).astype(np.float64) for window in _held_out()]
    rows = [row - row.max(axis=1, keepdims=True) for row in rows]
    return [row - np.log(np.exp(row).sum(axis=1, keepdims=True)) for row in rows]


@pytest.mark.slow
def test_it_diverges_at_most_half_as_far_as_int4_per_channel_and_less_than_plain_groups(
    awq: Path, tmp_path: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "bfloat16": {}, "per channel": {"precision": "int4_weight_only"},
        "groups": {"precision": "int4_weight_only", "group_size": 128},
    }  # fmt: skip
    for name, asked in kinds.items():
        convert(SMALL_MODEL, tmp_path / name, **asked)
    wanted = _log_probs(tmp_path / "bfloat16")

    def divergence(folder: Path) -> float:
        pairs = zip(wanted, _log_probs(folder), strict=True)
        return float(np.mean([(np.exp(p) * (p - q)).sum(axis=1).mean() for p, q in pairs]))

    found = divergence(awq)
    assert found <= 0.5 * divergence(tmp_path / "per channel")
    assert found <= 0.6 * divergence(tmp_path / "groups")


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_weights_that_the_file_stands_for(awq: Path, tmp_path: Path) -> None:
    cpu.build(awq, tmp_path / "engine", cpu.CpuOptions())
    weights = checkpoint_weights(awq)
    prompts = [_ids(text).tolist() for text in ("In the beginning", "And the LORD said unto Moses", "The king")]
    engine = Engine.load(tmp_path / "engine", kv_cache_tokens=512)
    try:
        found = cpu_engines.run(engine, *(Request(prompt, 24) for prompt in prompts))
    finally:
        engine.close()
    for prompt, tokens in zip(prompts, found, strict=True):
        assert len(tokens) == 24
        rows = logits(weights, SHAPE, np.array(prompt + tokens))[len(prompt) - 1 : -1]
        assert rows.argmax(axis=1).tolist() == tokens


@pytest.mark.slow
def test_ranks_hold_the_parts_of_what_one_rank_holds(awq: Path, tmp_path: Path) -> None:
    """Calibrated is the whole model, whatever it is cut into: q, k, v and fc by rows, dense and proj by columns."""
    convert(SMALL_MODEL, tmp_path / "cut", precision="int4_awq", calibration=CALIBRATION, tp=2, pp=2)
    whole = load_file(awq / "rank0.safetensors")
    layer, rank = "transformer.layers.3", load_file(tmp_path / "cut" / "rank3.safetensors")  # tp rank 1, pp rank 1
    local = "transformer.layers.1"
    for module, inputs in (("attention.dense", 256), ("mlp.proj", 768)):
        name, half = f".{module}.", inputs // 2
        assert (rank[f"{local}{name}weight"] == whole[f"{layer}{name}weight"][:, half:]).all()
        groups = half // 128
        scales = whole[f"{layer}{name}weights_scaling_factor"]
        assert (rank[f"{local}{name}weights_scaling_factor"] == scales[:, groups:]).all()
        factors = whole[f"{layer}{name}prequant_scaling_factor"]
        assert (rank[f"{local}{name}prequant_scaling_factor"] == factors[half:]).all()
    fc = whole[f"{layer}.mlp.fc.weight"]
    assert (rank[f"{local}.mlp.fc.weight"] == fc[len(fc) // 2 :]).all()
    q, k, v = np.split(whole[f"{layer}.attention.qkv.weight"], [128, 160])  # bytes hold two rows
    assert (rank[f"{local}.attention.qkv.weight"] == np.concatenate([q[64:], k[16:], v[16:]])).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(awq: Path, tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    words: list[str | Path]
    words = ["convert", SMALL_MODEL, "--output", output, "--precision", "int4_awq", "--calibration", TEXT,
             "--calibration-sequences", "32", "--calibration-tokens", "256"]  # fmt: skip
    paths = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    run = [sys.executable, "-m", "minitron_cli", *map(str, words)]
    for done in (0, 2):  # layers that are finished when it is killed: in the middle of the next one
        process = subprocess.Popen(run, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
        waited_for = tmp_path / "checkpoint.calibration" / (f"layer-{done - 1:04d}.npz" if done else "about.json")
        while not waited_for.exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    code, _, err = minitron_here(*words)
    assert code == 0, err
    assert (output / "rank0.safetensors").read_bytes() == (awq / "rank0.safetensors").read_bytes()
    assert not (tmp_path / "checkpoint.calibration").exists()


def test_texts_that_go_through_a_layer_together_do_not_see_each_other() -> None:
    generator = np.random.default_rng(0)
    source = open_model(str(SMALL_MODEL), None)
    names = {name.removeprefix("model.layers.0."): tensor for name, tensor in source.tensors().items()}
    layer = Layer(SHAPE, {name: tensor.read(0, tensor.shape[0]).astype(np.float32) for name, tensor in names.items()})
    source.close()
    texts = generator.standard_normal((3, 40, SHAPE.hidden_size)).astype(np.float32)
    together = layer(texts, lambda _name, _rows: None)
    for number in range(3):
        alone = layer(texts[number : number + 1], lambda _name, _rows: None)[0]
        assert together[number] == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_another_calibration_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_model(str(SMALL_MODEL), None)
    tokenizer = (SMALL_MODEL / "tokenizer.json").read_bytes()

    def kv_scale(tokens: int) -> np.float32:
        ids = CalibrationText(TEXT, 2, tokens).ids(tokenizer, SHAPE.vocab_size, SHAPE.max_positions)
        work = tmp_path / "work"
        return calibrate(source.tensors(), SHAPE, ids, work, dtype=DTYPES["bfloat16"], group=None).kv_scale(0)

    short = kv_scale(16)
    assert "beginning anew" not in caplog.text
    assert kv_scale(256) > short
    assert "of another calibration; beginning anew" in caplog.text
    source.close()


def test_the_scale_of_keys_and_values_is_modelopts(tmp_path: Path) -> None:
    """ModelOpt calibrated with bfloat16 arithmetic, ours is float32: 1 % apart at most."""
    index = json.loads((DATA / "modelopt" / "index.json").read_text(encoding="utf-8"))
    source = open_model(str(cases.write_model(tmp_path / "model")), None)
    found = calibrate(
        source.tensors(), cases.SHAPE, cases.calibration_ids(), tmp_path / "work", dtype=DTYPES["bfloat16"], group=None
    )
    for name, value in index["cases"]["bf16_int8_kv-tp1"]["kv"].items():
        if name.endswith(".kv_cache_scaling_factor"):
            assert found.kv_scale(int(name.split(".")[2])) == pytest.approx(value, rel=0.01)
    source.close()


def test_an_int8_kv_cache_is_the_plugins_eight_bits(tmp_path: Path) -> None:
    code, out, err = minitron_here(
        "convert", SMALL_MODEL, "--output", tmp_path / "c", "--kv-cache", "int8", "--calibration", TEXT,
        "--calibration-sequences", "2", "--calibration-tokens", "64", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["kv_cache"] == "INT8"
    stored = load_file(tmp_path / "c" / "rank0.safetensors")
    assert [value.shape for name, value in stored.items() if "kv_cache" in name] == [(1,)] * SHAPE.num_layers
    code, out, err = minitron_here("build", tmp_path / "c", "--output", tmp_path / "e", "--json")
    assert code == 0, err
    config = json.loads((tmp_path / "e" / "config.json").read_text(encoding="utf-8"))
    assert cpu_execution.properties(config) == {"EXECUTION_MODE_HINT": "ACCURACY", "KV_CACHE_PRECISION": "u8"}
    engine = Engine.load(tmp_path / "e", kv_cache_tokens=256)
    try:
        found = cpu_engines.run(engine, Request(_ids("In the beginning").tolist(), 8))[0]
    finally:
        engine.close()
    weights = checkpoint_weights(tmp_path / "c")
    prompt = _ids("In the beginning").tolist()
    assert len(found) == 8
    assert found[0] == int(logits(weights, SHAPE, np.array(prompt))[-1].argmax())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int4_awq"], "int4_awq needs a text like those that will be served: --calibration"),
        (["--kv-cache", "int8"], "--kv-cache int8 needs a text"),
        (["--precision", "int8_weight_only", "--group-size", "128"], "group_size 128 goes with"),
        (["--precision", "int4_weight_only", "--group-size", "32"], "group_size"),
        (["--precision", "int4_weight_only", "--group-size", "128", "--tp", "4"], "64 inputs of dense per rank"),
        (["--precision", "int4_weight_only", "--group-size", "128", "--quantize-at-build"], "leave --group-size out"),
        (["--precision", "int4_awq", "--calibration", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--precision", "int4_awq", "--calibration", TEXT, "--calibration-tokens", "4096"], "2048"),
    ],
)
def test_what_cannot_be_is_refused(words: list[Any], said: str, tmp_path: Path) -> None:
    code, _, err = minitron_here("convert", SMALL_MODEL, "--output", tmp_path / "c", *words)
    assert code != 0 and said in err
    assert not list(tmp_path.iterdir())


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    tokenizer = (SMALL_MODEL / "tokenizer.json").read_bytes()
    lines = [json.dumps({"text": text, "source": 1}) for text in ("In the beginning God created", "the heaven")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = CalibrationText(tmp_path / "t.jsonl", 9, 2).ids(tokenizer, SHAPE.vocab_size, 64)
    expected = np.concatenate([_ids("In the beginning God created"), _ids("the heaven")])
    assert found.reshape(-1).tolist() == expected[: found.size].tolist() and found.shape[1] == 2
    (tmp_path / "t.jsonl").write_text(lines[0] + '\n{"no text": 1}\n', encoding="utf-8")
    with pytest.raises(Exception, match=r't\.jsonl:2 is no JSON object with a "text"'):
        CalibrationText(tmp_path / "t.jsonl").ids(tokenizer, SHAPE.vocab_size, 2048)
