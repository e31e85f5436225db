"""verify: one byte changed anywhere along the chain is found and its file named."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conftest import minitron
from minitron.artifacts import manifest
from minitron.artifacts.problem import Problem
from minitron.artifacts.verify import verify


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Model, checkpoint and engine of a few bytes each, one made from the other; the engine's folder."""
    model, checkpoint, engine = (tmp_path / name for name in ("model", "checkpoint", "engine"))
    for folder, names in ((model, ["config.json"]), (checkpoint, ["config.json", "rank0.safetensors"]),
                          (engine, ["config.json", "rank0.engine", "tokenizer/tokenizer.json"])):  # fmt: skip
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(f"{folder.name} {name} ".encode() * 3)
    records = {"config.json": manifest.FileRecord.of(model / "config.json")}
    source = manifest.Input("huggingface", str(model), manifest.digest_of(records), files=records)
    manifest.write(checkpoint, "checkpoint", source, arguments={"tp": 1}, details={"share": 0.25, "name": "ü"})
    made_from, _ = manifest.input_of(checkpoint, "checkpoint")
    manifest.write(engine, "engine", made_from, arguments={}, details={"limits": {"max_batch_size": 4}})
    return engine


def failures(folder: Path) -> list[Problem]:
    return [finding for finding in verify(folder) if finding.is_error]


def test_an_untouched_chain_is_as_recorded(chain: Path) -> None:
    findings = verify(chain)
    assert [finding.level for finding in findings] == ["ok", "ok", "ok"]
    assert [Path(finding.file).name for finding in findings] == ["engine", "checkpoint", "model"]


def test_every_byte_of_every_file_counts(chain: Path) -> None:
    """Each bit pattern of a byte is another one: flipping its lowest bit changes it whatever it was."""
    for path in sorted(file for file in chain.parent.rglob("*") if file.is_file()):
        whole = path.read_bytes()
        status = path.stat()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            named = {finding.file for finding in failures(chain)}
            assert str(path) in named or str(path.parent) in named, f"byte {place} of {path}"
        path.write_bytes(whole)
        assert status.st_size == len(whole)
    assert not failures(chain)


def test_missing_and_added_files_are_named(chain: Path) -> None:
    (chain / "rank0.engine").unlink()
    (chain / "rank1.engine").write_bytes(b"who put this here?")
    assert {(Path(found.file).name, found.message.split(":")[0]) for found in failures(chain)} == {
        ("rank0.engine", "is missing"),
        ("rank1.engine", "is not recorded"),
    }


def test_an_input_that_was_made_again_is_named(chain: Path) -> None:
    checkpoint = chain.parent / "checkpoint"
    (checkpoint / "rank0.safetensors").write_bytes(b"other weights")
    old = manifest.read(checkpoint, "checkpoint")
    manifest.write(checkpoint, "checkpoint", old.input, arguments=old.arguments, details=old.details)
    (found,) = failures(chain)
    assert found.file == str(checkpoint)
    assert "was made again since" in found.message


def test_a_resealed_manifest_does_not_hide_another_digest(chain: Path) -> None:
    """Who changes the manifest and its seal still has not changed what was made from it."""
    checkpoint = chain.parent / "checkpoint"
    record = manifest.read(checkpoint, "checkpoint")
    raw = asdict(record) | {"digest": "0" * 64}
    forged = manifest.Manifest(**raw | {"input": record.input, "files": record.files}).sealed()
    (checkpoint / manifest.NAME).write_text(forged.text())
    assert any(found.file == str(checkpoint) for found in failures(chain))


def test_what_is_not_here_is_a_warning(chain: Path) -> None:
    shutil.rmtree(chain.parent / "checkpoint")
    assert [finding.level for finding in verify(chain)] == ["ok", "warning"]


def test_the_command_follows_a_real_chain(small_repository: Any) -> None:
    folder = small_repository("int8_weight_only")
    document = json.loads(minitron("check", folder, "--hash", "--json").stdout)
    assert document["ok"] is True
    hashed = [finding for finding in document["findings"] if finding["level"] == "ok"]
    assert [finding["message"].split(":")[0] for finding in hashed] == [
        "repository", "engine", "checkpoint", "source model",
    ]  # fmt: skip


def test_the_command_fails_and_names_the_file(chain: Path) -> None:
    (chain / "rank0.engine").write_bytes(b"x")
    done = minitron("check", chain, check=False)
    assert done.returncode == 3
    assert str(chain / "rank0.engine") in done.stdout
    assert minitron("check", chain.parent / "model", check=False).returncode == 3
