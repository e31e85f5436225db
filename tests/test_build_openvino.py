"""CPU engines: what they compute, held against transformers, and what their folder holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import cpu_engines
import random_model
from answers import Answers
from conftest import ROOMS, ROOT, minitron
from minitron.artifacts import manifest
from minitron.errors import CheckpointError, InputError, OutputExists, UsageError
from minitron.model import shape
from minitron.model.precision import ROUNDED, Precision
from minitron_build.checkpoint.convert import convert
from minitron_build.engines.openvino import ir
from minitron_build.engines.openvino import write as cpu
from nemotron_reference import MUTATIONS, source_weights

LOGIT_ERROR = 1e-3
INT4 = Precision.INT4_WEIGHT_ONLY


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", cpu_engines.MODELS)
def test_logits_equal_those_of_transformers(name: str, precision: Precision) -> None:
    """Expected: transformers' NemotronForCausalLM in float32 on the checkpoint's (dequantised) weights."""
    answers = Answers.load(name)
    found = cpu_engines.rows_of_logits(cpu_engines.engine(name, precision), answers, precision)
    assert np.abs(found - answers.variants[precision].logits).max() < LOGIT_ERROR


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_model_is_noticed(mutation: str, tmp_path: Path) -> None:
    """The comparison above can fail: each of these makes a wrong source model, and its engine is far off."""
    source = cpu_engines.model("other")
    right = shape.read(source / "config.json")
    weights, mutated = MUTATIONS[mutation](source_weights(source), right)
    model = tmp_path / "model"
    model.mkdir()
    config = random_model.hugging_face_config(mutated)
    (model / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value) for key, value in weights.items()}, model / "model.safetensors"
    )
    convert(model, tmp_path / "checkpoint", precision="bfloat16")
    cpu.build(tmp_path / "checkpoint", tmp_path / "engine", cpu.CpuOptions())
    answers = Answers.load("other")
    found = cpu_engines.rows_of_logits(tmp_path / "engine", answers, Precision.BFLOAT16)
    assert np.abs(found - answers.variants[Precision.BFLOAT16].logits).max() > 50 * LOGIT_ERROR


def test_the_weights_stay_as_small_as_in_the_checkpoint() -> None:
    """Codes and 16-bit tensors are stored as such: within 5 % of the checkpoint's own size, tables apart."""
    for precision in ROUNDED:
        weights = sum(path.stat().st_size for path in cpu_engines.checkpoint("small", precision).glob("*.safetensors"))
        ir = (cpu_engines.engine("small", precision) / "openvino" / "openvino_model.bin").stat().st_size
        assert ir < 1.06 * weights, precision


def test_sixteen_bit_constants_are_marked_so_that_they_stay_compressed() -> None:
    """OpenVINO expands a float16 or bfloat16 constant to float32 on load unless its Convert says "decompression"."""
    tree = ET.parse(cpu_engines.engine("small", Precision.INT8_WEIGHT_ONLY) / "openvino" / "openvino_model.xml")
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    kinds: dict[str | None, int] = {}
    for edge in tree.iterfind("edges/edge"):
        constant, reader = layers[edge.get("from-layer")], layers[edge.get("to-layer")]
        element = next((data.get("element_type") for data in constant.iterfind("data")), None)
        if constant.get("type") != "Const" or element not in ("i8", "bf16"):
            continue
        kinds[element] = kinds.get(element, 0) + 1
        marks = [mark.attrib for mark in reader.iterfind("rt_info/attribute")]
        assert marks == ([{"name": "decompression", "version": "0"}] if element == "bf16" else [])
    layers_of_model = shape.read(cpu_engines.model("small") / "config.json").num_layers
    assert kinds == {"i8": 4 * layers_of_model, "bf16": 2}  # four linear weights each; embedding and head


def test_quantising_at_build_gives_the_same_engine(tmp_path: Path) -> None:
    """TensorRT-LLM's rule is one rule, wherever it is applied (the contract: results equal)."""
    late = tmp_path / "late"
    convert(cpu_engines.model("small"), late, precision=INT4.value, dtype="bfloat16", quantize_at_build=True)
    cpu.build(late, tmp_path / "engine", cpu.CpuOptions())
    name = "openvino/openvino_model.bin"
    assert (tmp_path / "engine" / name).read_bytes() == (cpu_engines.engine("small", INT4) / name).read_bytes()


def test_an_int8_head_is_close_and_only_made_on_request(tmp_path: Path) -> None:
    built = cpu.build(
        cpu_engines.checkpoint("other", Precision.BFLOAT16), tmp_path / "engine", cpu.CpuOptions(lm_head="int8")
    )
    answers = Answers.load("other")
    expected = answers.variants[Precision.BFLOAT16].logits
    error = np.abs(cpu_engines.rows_of_logits(tmp_path / "engine", answers, Precision.BFLOAT16) - expected)
    assert LOGIT_ERROR < error.max() < 0.1  # eight bits of logits around 1
    assert built.details["lm_head"] == "int8"
    as_is = manifest.read(cpu_engines.engine("other", Precision.BFLOAT16), "engine")
    assert as_is.details["lm_head"] == "as_is"


def test_the_folder_says_what_it_is() -> None:
    """config.json has the three keys of a TensorRT-LLM engine (trtllm-build.md, "Engine directory")."""
    checkpoint, engine = cpu_engines.checkpoint("small", INT4), cpu_engines.engine("small", INT4)
    config = json.loads((engine / "config.json").read_text())
    assert config["version"].startswith("openvino 2026.")
    assert config["pretrained_config"] == json.loads((checkpoint / "config.json").read_text())
    limits = {"max_batch_size": 16, "max_input_len": 2048, "max_seq_len": 2048, "max_num_tokens": 256}
    assert limits.items() <= config["build_config"].items()
    assert config["build_config"]["max_beam_width"] == 1
    properties = {"EXECUTION_MODE_HINT": "ACCURACY"}
    assert config["cpu"] == {"execution": "exact", "lm_head": "as_is", "overflow": "none", "properties": properties}
    record = manifest.read(engine, "engine")
    assert record.input.digest == manifest.read(checkpoint, "checkpoint").digest
    assert record.details["limits"] == limits
    assert record.details["has_tokenizer"] and (engine / "tokenizer" / "tokenizer.json").is_file()
    assert record.files["openvino/openvino_model.bin"] == manifest.FileRecord.of(engine / "openvino/openvino_model.bin")


def test_limits_are_taken_or_refused(tmp_path: Path) -> None:
    checkpoint = cpu_engines.checkpoint("small", INT4)
    options = cpu.CpuOptions(max_batch_size=4, max_input_len=100, max_seq_len=150, max_num_tokens=64)
    built = cpu.build(checkpoint, tmp_path / "engine", options)
    assert built.details["limits"] == {
        "max_batch_size": 4, "max_input_len": 100, "max_seq_len": 150, "max_num_tokens": 64,
    }  # fmt: skip
    for wrong in (
        cpu.CpuOptions(max_seq_len=2049),  # the model has 2048 positions
        cpu.CpuOptions(max_seq_len=64, max_input_len=65),
        cpu.CpuOptions(max_batch_size=8, max_num_tokens=7),
        cpu.CpuOptions(max_batch_size=0),
    ):
        with pytest.raises(UsageError):
            cpu.build(checkpoint, tmp_path / "wrong", wrong)
    assert os.listdir(tmp_path) == ["engine"]


def test_a_split_checkpoint_is_refused(tmp_path: Path) -> None:
    convert(cpu_engines.model("small"), tmp_path / "tp2", precision="bfloat16", tp=2)
    with pytest.raises(CheckpointError, match=r"2 x 1 .*--tp 1 --pp 1"):
        cpu.build(tmp_path / "tp2", tmp_path / "engine", cpu.CpuOptions())
    assert not (tmp_path / "engine").exists()


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, cpu_engines.model("small"), cpu_engines.engine("small", INT4)):
        with pytest.raises(CheckpointError):
            cpu.build(folder, tmp_path / "engine", cpu.CpuOptions())
    done = minitron("build", tmp_path, "--target", "cpu", "--output", tmp_path / "engine", check=False)
    assert done.returncode == CheckpointError.exit_code
    assert done.stderr.count("\n") == 1 and "config.json" in done.stderr


def test_a_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    """A changed byte in the weights reads well; only the manifest tells."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(cpu_engines.checkpoint("small", INT4), copy)
    cpu.build(copy, tmp_path / "engine", cpu.CpuOptions())  # other times, same bytes
    weights = copy / "rank0.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"rank0\.safetensors"):
        cpu.build(copy, tmp_path / "engine", cpu.CpuOptions(), force=True)


def test_the_output_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = cpu_engines.checkpoint("small", INT4)
    with monkeypatch.context() as patch:
        patch.setattr(ir, "_point_to", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            cpu.build(checkpoint, tmp_path / "engine", cpu.CpuOptions())
    assert os.listdir(tmp_path) == []
    cpu.build(checkpoint, tmp_path / "engine", cpu.CpuOptions())
    with pytest.raises(OutputExists):
        cpu.build(checkpoint, tmp_path / "engine", cpu.CpuOptions())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """440 MB of weights (two tables of 164 MB) are built in the memory of a few pieces beside OpenVINO itself."""
    big = shape.ModelShape(
        vocab_size=160_000, hidden_size=512, intermediate_size=5120, num_layers=10, num_heads=8, num_kv_heads=8,
        max_positions=256, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip
    random_model.write_random_model(tmp_path / "model", big, tokenizer=False)
    convert(tmp_path / "model", tmp_path / "checkpoint", precision="bfloat16")
    shutil.rmtree(tmp_path / "model")
    done = minitron("build", tmp_path / "checkpoint", "--output", tmp_path / "engine", "--json")
    document = json.loads(done.stdout)
    assert document["weight_bytes"] > 400e6
    assert not document["has_tokenizer"]
    assert document["peak_memory_bytes"] < 180e6


WATCH = """
import sys, time
seen = []
network = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
sys.addaudithook(lambda event, args: seen.append(event) if event in network else None)
"""
BUILD = """
from pathlib import Path
from minitron_build.engines.openvino import write as cpu
cpu.build(Path({checkpoint!r}), Path({output!r}), cpu.CpuOptions())
"""
GENERATE = """
import queue
from minitron_triton.models.tensorrt_llm.cpu_engine import Engine
from minitron_triton.models.tensorrt_llm.generation_request import Request
engine = Engine.load({engine!r}, kv_cache_tokens=256)
chunks = queue.SimpleQueue()
engine.submit(Request([5, 6], 4), chunks.put)
made = [chunks.get(timeout=60)]
while made[-1].finish is None:
    made.append(chunks.get(timeout=60))
assert sum(len(chunk.token_ids) for chunk in made) == 4
engine.close()
"""
REPORT = """
time.sleep(1)
print(seen, [name for name in sys.modules if name.startswith("openvino_telemetry.")])
"""


@pytest.mark.parametrize("work", [BUILD, GENERATE], ids=["build", "generate"])
def test_nothing_is_sent_or_written_about_the_user(work: str, tmp_path: Path) -> None:
    """Importing OpenVINO as it comes starts an analytics thread and writes ~/intel; building and running must not."""
    home = tmp_path / "home"
    home.mkdir()
    places = {
        "checkpoint": str(cpu_engines.checkpoint("small", INT4)),
        "engine": str(cpu_engines.engine("small", INT4)),
        "output": str(tmp_path / "engine"),
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCH + work.format(**places) + REPORT],
        capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)},
    )  # fmt: skip
    assert done.stdout.strip() == "[] []"
    assert os.listdir(home) == []
