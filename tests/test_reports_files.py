"""Which files of a model folder hold its weights: situations that people reported elsewhere, with what is right.

Right is what transformers reads: its own function is asked about every folder in ``make test-reference``
(``modeling_utils._get_resolved_checkpoint_files``). The weights "new" and "old" differ in every value, so that the
checkpoint itself says which were converted.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DATA
from hub_server import hub
from minitron.errors import ModelError
from minitron_build.checkpoint.convert import convert
from minitron_build.sources import hub as hubs

HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@functools.cache
def tensors(age: str) -> dict[str, Any]:
    """The golden model's weights, or other ones of the same shapes."""
    new = load_file(HF / SINGLE)
    return new if age == "new" else {name: (array.astype(np.float32) * -0.5).astype(array.dtype)
                                     for name, array in new.items()}  # fmt: skip


def write(folder: Path, name: str, age: str, part: slice = slice(None)) -> list[str]:
    """Write some of the weights as a file; their names."""
    names = sorted(tensors(age))[part]
    save_file({one: tensors(age)[one] for one in names}, folder / name, metadata={"format": "pt"})
    return names


def single(age: str, name: str = SINGLE) -> Callable[[Path], object]:
    return lambda folder: write(folder, name, age)


def sharded(age: str, index: str = INDEX) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        parts = [write(folder, SHARDS[0], age, slice(0, 9)), write(folder, SHARDS[1], age, slice(9, None))]
        weight_map = {name: shard for shard, names in zip(SHARDS, parts, strict=True) for name in names}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return make


def config(**values: Any) -> Callable[[Path], object]:
    path = "config.json"
    return lambda folder: (folder / path).write_text(json.dumps(json.loads((HF / path).read_text()) | values))


def junk(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"not what its name says")


@dataclass(frozen=True)
class Situation:
    """A folder, who reported it, which weights are right ("new", or the words of a refusal), what is passed over."""

    about: str
    source: str
    make: tuple[Callable[[Path], object], ...]
    right: str
    passed_over: tuple[str, ...] = ()
    transformers: str = field(default="new")


SITUATIONS = [
    Situation("old shards and their index beside a newer single file", "diffusers#14719, mlx-vlm#1827",
              (sharded("old"), single("new")), "new", (*SHARDS, INDEX)),
    Situation("the same, the old shards already removed", "mlx-vlm#1827",
              (sharded("old"), single("new"), lambda folder: (folder / SHARDS[0]).unlink()), "new", (SHARDS[1], INDEX)),
    Situation("the same, the old index is broken", "mlx-vlm#1827", (junk(INDEX), single("new")), "new", (INDEX,)),
    Situation("the vendor's own copy beside the model", "InfiniLM#467",
              (single("new"), single("old", "consolidated.safetensors")), "new", ("consolidated.safetensors",)),
    Situation("another number of shards left over", "mflux#603, mlx-vlm#1464",
              (sharded("new"), single("old", "model-00001-of-00003.safetensors")), "new",
              ("model-00001-of-00003.safetensors",)),
    Situation("a variant beside the model", "diffusers' and transformers' variant=fp16",
              (single("new"), single("old", "model.fp16.safetensors")), "new", ("model.fp16.safetensors",)),
    Situation("weights in the old format beside it", "every folder with both, as of Llama 2",
              (single("new"), junk("pytorch_model.bin")), "new", ("pytorch_model.bin",)),
    Situation("an adapter's weights that were saved into the folder", "without adapter_config.json",
              (single("new"), junk("adapter_model.safetensors")), "new", ("adapter_model.safetensors",)),
    Situation("config.json names the file", "transformers_weights of transformers 5",
              (single("old"), single("new", "other.safetensors"), config(transformers_weights="other.safetensors")),
              "new", (SINGLE,)),
    Situation("config.json names an index", "transformers_weights of transformers 5",
              (single("old"), sharded("new", "other.safetensors.index.json"),
               config(transformers_weights="other.safetensors.index.json")), "new", (SINGLE,)),
    Situation("config.json names a file that is not there", "transformers_weights of transformers 5",
              (single("new"), config(transformers_weights="other.safetensors")), "transformers_weights",
              transformers="refuses"),
    Situation("config.json names a file elsewhere", "transformers_weights of transformers 5",
              (single("new"), config(transformers_weights="../other.safetensors")), "transformers_weights",
              transformers="refuses"),
    Situation("a LoRA adapter with a config.json", "transformers loads the base that adapter_config.json names",
              (single("new"), junk("adapter_config.json")), "LoRA adapter"),
    Situation("old format alone", "transformers reads it, with torch", (junk("pytorch_model.bin"),),
              "save it again with safe_serialization=True", transformers="pytorch_model.bin"),
    Situation("an index whose files are gone", "sglang#32279",
              (sharded("new"), lambda folder: (folder / SHARDS[1]).unlink()), SHARDS[1], transformers="refuses"),
    Situation("shards without their index: one set, though transformers reads none", "transformers' OSError",
              (sharded("new"), lambda folder: (folder / INDEX).unlink()), "new", transformers="refuses"),
]  # fmt: skip


@pytest.fixture(params=SITUATIONS, ids=lambda one: one.about)
def situation(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Situation, Path]:
    """A situation, and its folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(HF / "config.json", folder / "config.json")
    for make in request.param.make:
        make(folder)
    return request.param, folder


def check(situation: Situation, model: str, folder: Path) -> None:
    """Convert ``model`` and compare with the checkpoint of the golden model itself."""
    if situation.right != "new":
        with pytest.raises(ModelError) as refused:
            convert(model, folder / "out")
        assert situation.right in str(refused.value)
        return
    convert(HF, folder / "right")
    done = convert(model, folder / "out")
    assert (done.folder / "rank0.safetensors").read_bytes() == (folder / "right" / "rank0.safetensors").read_bytes()
    said = " ".join(done.manifest.details.get("remarks", []))
    assert bool(said) == bool(situation.passed_over)
    for name in situation.passed_over:
        assert name in said


def test_a_folder(situation: tuple[Situation, Path], tmp_path: Path) -> None:
    check(situation[0], str(situation[1]), tmp_path)


def test_a_hugging_face_id(situation: tuple[Situation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder as a repository: the same weights, and the others are not fetched."""
    import huggingface_hub.constants

    one, folder = situation
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub(folder, "acme/Tiny") as server:
        _ask_only(server.url, monkeypatch)
        check(one, "acme/Tiny", tmp_path)
        if one.right == "new":
            assert not {name for _, name, _ in server.asked}.intersection(one.passed_over)


def _ask_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, which reads HF_ENDPOINT when it is imported, to our server."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=url))
    fetch = functools.partial(huggingface_hub.hf_hub_download, endpoint=url)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert hubs.is_id("acme/Tiny")


@pytest.mark.reference
def test_transformers_reads_these_files(situation: tuple[Situation, Path]) -> None:
    from transformers import NemotronConfig
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    one, folder = situation
    explicit = getattr(NemotronConfig.from_pretrained(folder), "transformers_weights", None)

    def files() -> set[str]:
        found, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False, explicit)
        assert all(Path(name).is_file() for name in found)
        return {Path(name).name for name in found}

    if one.transformers == "refuses":
        with pytest.raises((OSError, ValueError, AssertionError)):
            files()
    elif one.transformers != "new":
        assert files() == {one.transformers}
    else:
        weights: dict[str, Any] = {}
        for name in files():
            weights |= load_file(folder / name)
        assert all(np.array_equal(weights[name], tensors("new")[name]) for name in tensors("new"))


def test_the_summary_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minitron_cli import main

    shutil.copytree(HF, tmp_path / "model")
    sharded("old")(tmp_path / "model")
    assert main.main(["convert", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{SINGLE} is read, as by transformers; not {SHARDS[0]}, {SHARDS[1]}, {INDEX}" in said
