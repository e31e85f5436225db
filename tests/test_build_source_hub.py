"""Models by Hugging Face id, with a server of our own in the place of huggingface.co and the real huggingface_hub."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import random_model
from conftest import DATA
from hub_server import COMMIT, HubServer, hub

MODEL = "acme/Tiny-Nemotron"
TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """The golden model as a repository, with files that converting has no use for."""
    folder = tmp_path / "repository"
    shutil.copytree(HF, folder)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "README.md").write_text("about")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    with hub(folder, MODEL) as running:
        yield running


def _convert(server: HubServer | str, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    url = server if isinstance(server, str) else server.url
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-m", "minitron_cli", "convert", MODEL, "--output", str(tmp_path / "out"), *more],
        capture_output=True, text=True, check=False, timeout=120,
        env=environment | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"},
    )  # fmt: skip


def test_fetches_what_is_needed_and_records_the_commit(server: HubServer, tmp_path: Path) -> None:
    done = _convert(server, tmp_path, "--revision", "main")
    assert done.returncode == 0, done.stderr
    assert {name for _, name, _ in server.asked} == {"config.json", "model.safetensors", "tokenizer.json"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["input"]["path"], manifest["input"]["revision"]) == (MODEL, COMMIT)
    assert manifest["arguments"]["revision"] == "main"
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == TOKENIZER


def test_a_broken_download_goes_on_where_it_ended(tmp_path: Path) -> None:
    """huggingface_hub keeps whole pieces of 10 MiB; the line breaks after one of them and a bit."""
    shape = dataclasses.replace(random_model.SHAPES["tiny"], vocab_size=12_000)
    random_model.write_random_model(tmp_path / "repository", shape, tokenizer=False)
    with hub(tmp_path / "repository", MODEL) as server:
        server.break_after = 11_000_000
        done = _convert(server, tmp_path)
        if done.returncode:  # the library gave up, and the next run goes on
            assert "run the same command again" in done.stderr
            done = _convert(server, tmp_path)
        assert done.returncode == 0, done.stderr
        ranges = [wanted for method, name, wanted in server.asked if (method, name) == ("GET", "model.safetensors")]
    assert [wanted and wanted.removesuffix("-") for wanted in ranges] == [None, "bytes=10485760"]


def test_without_the_network_the_cache_serves(server: HubServer, tmp_path: Path) -> None:
    assert _convert(server, tmp_path).returncode == 0
    again = _convert("http://127.0.0.1:9", tmp_path, "--force")
    assert again.returncode == 0, again.stderr
    assert "as fetched before" in again.stderr


def test_an_index_decides_which_weights_are_fetched(server: HubServer, tmp_path: Path) -> None:
    shutil.copy(server.folder / "model.safetensors", server.folder / "consolidated.safetensors")
    weight_map = {"model.norm.weight": "model.safetensors"}
    (server.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert _convert(server, tmp_path).returncode == 0
    assert "consolidated.safetensors" not in {name for _, name, _ in server.asked}


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write_llama(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (_remove("model.safetensors"), [], "has no *.safetensors file, only pytorch_model.bin"),
        (_remove("config.json"), [], "has no config.json"),
        (_write_llama, [], "is not Nemotron"),
        (_remove("README.md"), ["--revision", "v9"], "has no revision v9"),
    ],
)
def test_refusals(
    server: HubServer, tmp_path: Path, change: Callable[[Path], object], arguments: list[str], words: str
) -> None:
    change(server.folder)
    done = _convert(server, tmp_path, *arguments)
    assert done.returncode == 3
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert "model.safetensors" not in {name for _, name, _ in server.asked}


def test_an_unknown_model_and_no_network_are_told_apart(server: HubServer, tmp_path: Path) -> None:
    server.model = "acme/Other"
    assert "neither a folder here nor a model on Hugging Face" in _convert(server, tmp_path).stderr
    assert "could not be fetched" in _convert("http://127.0.0.1:9", tmp_path).stderr
