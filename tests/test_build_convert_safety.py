"""Convert from the command line: what is written, what is replaced, and what a kill or a bad input leaves behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import random_model
from conftest import DATA, ROOT, minitron
from minitron.errors import CheckpointError, ModelError, NoSpace, UsageError
from minitron_build.checkpoint import convert as converting
from minitron_build.checkpoint import write
from minitron_build.checkpoint.convert import convert
from minitron_build.checkpoint.read import Checkpoint
from minitron_cli import main

HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the golden model, to be spoilt."""
    return Path(shutil.copytree(HF, tmp_path / "model", copy_function=shutil.copyfile))


def _edit_weights(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def _edit_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps(config))


def _refused(model: Path, *arguments: str, code: int = 3) -> str:
    """The one line that a refusal prints; nothing may be left of the output. In this process, for speed."""
    before, errors, printed = set(model.parent.iterdir()), io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        found = main.main(["convert", str(model), "--output", str(model.parent / "out"), *arguments])
    assert (found, printed.getvalue()) == (code, ""), errors.getvalue()
    assert set(model.parent.iterdir()) == before
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_manifest_and_summary_say_what_was_done(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    done = minitron("convert", model, "--output", tmp_path / "out", "--precision", "int8_weight_only", "--json")
    summary, manifest = json.loads(done.stdout), json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (summary["precision"], summary["dtype"], summary["tensors"]) == ("int8_weight_only", "bfloat16", 31)
    assert summary["checkpoint_bytes"] < summary["source_bytes"]
    for name, record in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (record["sha256"], record["size"]) == (hashlib.sha256(content).hexdigest(), len(content)), name
    assert set(manifest["input"]["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, record in manifest["input"]["files"].items():
        assert record["sha256"] == hashlib.sha256((model / name).read_bytes()).hexdigest()
    assert manifest["details"]["has_tokenizer"] is True
    assert json.loads((tmp_path / "out" / "tokenizer" / "generation_config.json").read_text()) == {
        "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip


def test_the_table_names_sizes_and_memory(model: Path, tmp_path: Path) -> None:
    done = minitron("convert", model, "--output", tmp_path / "out")
    assert "peak_memory_bytes" in done.stdout
    assert "has_tokenizer      False" in done.stdout


def test_the_file_is_one_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    convert(HF, tmp_path / "out", precision="int4_weight_only")
    stored = load_file(tmp_path / "out" / "rank0.safetensors")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert set(stored) == set(checkpoint.names())
        for name, array in stored.items():
            assert array.tobytes() == checkpoint.array(name).tobytes()
        for rank_file in (tmp_path / "out").glob("*.safetensors"):
            header = int.from_bytes(rank_file.read_bytes()[:8], "little")
            assert header % 8 == 0  # so that four-byte elements stay aligned in the file


def test_an_existing_output_is_kept_until_the_new_one_is_complete(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, out)
    before = (out / "manifest.json").read_text()
    assert minitron("convert", model, "--output", out, check=False).returncode == 4
    _edit_weights(model, lambda tensors: tensors[QUERY].__setitem__((3, 5), float("nan")))
    assert minitron("convert", model, "--output", out, "--force", check=False).returncode == 3
    assert (out / "manifest.json").read_text() == before
    assert minitron("convert", HF, "--output", out, "--force", "--precision", "float16").returncode == 0
    assert json.loads((out / "manifest.json").read_text())["details"]["precision"] == "float16"


def test_the_model_itself_is_never_replaced(model: Path) -> None:
    for output in (model, model.parent):
        done = minitron("convert", model, "--output", output, "--force", check=False)
        assert done.returncode == 2
        assert (model / "model.safetensors").exists()


def test_kill_at_any_moment_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """The final name appears with everything behind it or not at all, and the next run cleans up."""
    shape = random_model.SHAPES["tiny"]
    random_model.write_random_model(tmp_path / "model", shape, tokenizer=False)
    argv = [sys.executable, "-m", "minitron_cli", "convert", str(tmp_path / "model"), "--output"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT / "core", ROOT / "build"]))}
    started = time.monotonic()
    subprocess.run([*argv, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    whole = time.monotonic() - started
    out, generator = tmp_path / "work" / "out", random.Random(5)
    seen_partial = 0
    for _ in range(8):
        process = subprocess.Popen([*argv, str(out), "--force"], env=environment, stdout=-3, stderr=-3)
        time.sleep(generator.uniform(0.3, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen_partial += any(path.name.startswith(".out.partial") for path in out.parent.glob(".*"))
        if out.exists():
            _assert_complete(out)
    subprocess.run([*argv, str(out), "--force"], env=environment, check=True, capture_output=True)
    _assert_complete(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def _assert_complete(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]


def test_a_kill_while_blocks_are_written_leaves_only_a_hidden_folder(tmp_path: Path) -> None:
    """Stopped for certain in the middle of the rank's file, not by chance."""
    script = (
        "import os, sys\n"
        "from minitron_build.checkpoint import convert, write\n"
        "plain = write._bytes\n"
        "left = [9]\n"
        "def bytes_(array):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), 9)\n"
        "    return plain(array)\n"
        "write._bytes = bytes_\n"
        "convert.convert(sys.argv[1], sys.argv[2])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT / "core", ROOT / "build"]))}
    folder = tmp_path / "work"
    argv = [sys.executable, "-c", script, str(HF), str(folder / "out")]
    assert subprocess.run(argv, env=environment, check=False).returncode == -signal.SIGKILL
    assert [path.name.startswith(".out.partial-") for path in folder.iterdir()] == [True]
    convert(HF, folder / "out")
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_and_during(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(NoSpace, match="100,000 bytes free and"):
            convert(HF, tmp_path / "work" / "out")

    def full(_: object) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_bytes", full)
    with pytest.raises(NoSpace, match="nothing was written"):
        convert(HF, tmp_path / "work" / "out")
    assert not list((tmp_path / "work").iterdir())


def test_a_model_that_changes_under_way_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write.write_rank

    def meddle(path: Path, *arguments: Any) -> str:
        digest = plain(path, *arguments)
        time.sleep(0.2)  # the hash of the input is made by then
        with open(model / "model.safetensors", "ab") as file:
            file.write(b"x")
        return digest

    monkeypatch.setattr(converting, "write_rank", meddle)
    with pytest.raises(ModelError, match="changed while it was converted"):
        convert(model, tmp_path / "work" / "out")
    assert not list((tmp_path / "work").iterdir())


def test_an_unwritable_place(tmp_path: Path) -> None:
    """Below a file: unwritable for root too."""
    (tmp_path / "file").write_text("")
    done = minitron("convert", HF, "--output", tmp_path / "file" / "out", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert "cannot write into" in done.stderr


def test_no_model_there(tmp_path: Path) -> None:
    done = minitron("convert", tmp_path / "nothing", "--output", tmp_path / "out", check=False)
    assert (done.returncode, "is not there" in done.stderr) == (3, True)


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def _set(value: float, dtype: Any = ml_dtypes.bfloat16) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        spoilt = tensors[QUERY].astype(dtype)
        spoilt[3, 5:8] = value
        tensors[QUERY] = spoilt

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda tensors: tensors.pop(QUERY), [], f"lacks tensor {QUERY}"),
        (lambda tensors: tensors.pop("lm_head.weight"), [], "lacks tensor lm_head.weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), [], "has, unknown to a Nemotron, tensor extra"),
        (_rename("model.norm.bias", "model.norm.beta"), [], "lacks tensor model.norm.bias"),
        (lambda t: t.update({QUERY: t[QUERY][:64].copy()}), [], f"{QUERY} has shape [64, 128], config.json asks for"),
        (_set(0, np.float64), [], f"{QUERY} has dtype F64"),
        (_set(0, np.int8), [], f"{QUERY} has dtype I8"),
        (_set(float("nan")), ["--precision", "int8_weight_only"], f"{QUERY} has 3 values that are NaN or infinite"),
        (_set(float("-inf")), [], f"{QUERY} has 3 values that are NaN or infinite"),
        (_set(65536.0), ["--precision", "float16"], f"{QUERY} has 3 values that are too large for float16; take"),
        (_set(-65520.0, np.float32), ["--precision", "float16"], "too large for float16; take bfloat16"),
        (_set(3.4e38, np.float32), [], f"{QUERY} has 3 values that are too large for bfloat16"),
    ],
)  # fmt: skip
def test_bad_weights(model: Path, change: Callable[[dict[str, Any]], object], arguments: list[str], words: str) -> None:
    _edit_weights(model, change)
    assert words in _refused(model, *arguments)


def test_the_largest_float16_is_no_overflow(model: Path, tmp_path: Path) -> None:
    """65519.996 rounds to 65504 (IEEE 754, round to nearest even); 65520 is the first to become infinite."""
    _edit_weights(model, _set(65519.996, np.float32))
    convert(model, tmp_path / "out", precision="float16")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.array("transformer.layers.1.attention.qkv.weight")[3, 5] == 65504


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is not NemotronForCausalLM"),
        ({"num_attention_heads": 5}, "do not make a hidden size of 128"),
        ({"head_dim": 64}, "do not make a hidden size of 128"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2"),
        ({"num_hidden_layers": 2_000_000_000}, "2000000000 layers, and there are 24 tensors"),
        ({"vocab_size": 161}, "has shape [160, 128], config.json asks for [161, 128]"),
        ({"vocab_size": "160"}, "vocab_size is '160'"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings"),
    ],
)
def test_bad_configs(model: Path, values: dict[str, object], words: str) -> None:
    _edit_config(model, **values)
    assert words in _refused(model)


def test_no_config_and_no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only pytorch_model.bin" in _refused(model)
    (model / "config.json").unlink()
    assert "config.json is not there" in _refused(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "3"], "--tp 3 does not divide"),
        (["--tp", "0"], "greater than or equal to 1"),
        (["--pp", "3"], "--pp 3 is more than the model's 2 layers"),
        (["--tp", "4", "--precision", "int8_weight_only"], "no multiple of 64"),
        (["--tp", "4", "--precision", "int4_weight_only", "--quantize-at-build"], "no multiple of 64"),
        (["--quantize-at-build"], "--quantize-at-build needs a weight-only --precision"),
        (["--precision", "float16", "--dtype", "bfloat16"], "does not go with precision float16"),
        (["--revision", "main"], "--revision main is for Hugging Face ids"),
    ],
)
def test_arguments_that_cannot_be(model: Path, arguments: list[str], words: str) -> None:
    assert words in _refused(model, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tp": 0}, "must be at least 1"),
        ({"pp": -1}, "must be at least 1"),
        ({"precision": "float16", "dtype": "bfloat16"}, "contradicts --precision float16"),
        ({"precision": "int2"}, "'int2' is not known"),
        ({"dtype": "float8"}, "'float8' is not known"),
    ],
)
def test_the_function_refuses_what_the_command_line_does(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        convert(HF, tmp_path / "out", **arguments)


def test_an_index_and_its_files_must_agree(model: Path) -> None:
    (model / "model.safetensors").rename(model / "two.safetensors")  # under its old name it would be read alone
    tensors = load_file(model / "two.safetensors")
    save_file(dict(list(tensors.items())[:5]), model / "one.safetensors")
    index = model / "model.safetensors.index.json"
    weight_map = {name: "one.safetensors" if number < 5 else "two.safetensors" for number, name in enumerate(tensors)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "is in another file of" in _refused(model)
    index.write_text(json.dumps({"weight_map": weight_map | {QUERY: "one.safetensors"}}))
    assert f"lacks tensor {QUERY}" in _refused(model)
    index.write_text(json.dumps({"weight_map": {QUERY: "../model/two.safetensors"}}))
    assert "only *.safetensors files beside it" in _refused(model)
    index.write_text(json.dumps({"weight_map": {QUERY: "absent.safetensors"}}))
    assert "absent.safetensors cannot be read" in _refused(model)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    convert(HF, tmp_path / "out", precision="int8_weight_only", tp=2)
    (tmp_path / "out" / "rank0.safetensors").replace(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"rank0.safetensors cannot be read"):
        Checkpoint.open(tmp_path / "out")
    convert(HF, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "rank0.safetensors", tmp_path / "out" / "rank0.safetensors")
    with pytest.raises(CheckpointError, match=r"rank0.safetensors(: .* asks for| lacks tensor)"):
        Checkpoint.open(tmp_path / "out")
