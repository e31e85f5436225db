"""Manifests: what is written is read back, and what changed is seen. Hashes are compared with hashlib's own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from minitron.artifacts import manifest
from minitron.errors import InputError

SOURCE = manifest.Input("huggingface", "some/model", "0" * 64, revision="main")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("tokens")
    manifest.write(tmp_path, "checkpoint", SOURCE, arguments={"precision": "float16"}, details={"tp": 1})
    return tmp_path


def test_round_trip(checkpoint: Path) -> None:
    found = manifest.read(checkpoint, "checkpoint")
    assert found.input == SOURCE
    assert found.arguments == {"precision": "float16"}
    assert set(found.files) == {"config.json", "tokenizer/tokenizer.json"}
    assert found.files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()


def test_the_digest_is_of_names_and_hashes(checkpoint: Path) -> None:
    lines = f"config.json {hashlib.sha256(b'{}').hexdigest()}\n"
    lines += f"tokenizer/tokenizer.json {hashlib.sha256(b'tokens').hexdigest()}\n"
    assert manifest.read(checkpoint, "checkpoint").digest == hashlib.sha256(lines.encode()).hexdigest()


def test_the_next_stage_records_it(checkpoint: Path) -> None:
    made_from, found = manifest.input_of(checkpoint, "checkpoint")
    assert (made_from.kind, made_from.digest) == ("checkpoint", found.digest)


def test_unchanged_sees_size_time_and_absence(checkpoint: Path) -> None:
    records = manifest.read(checkpoint, "checkpoint").files
    assert manifest.unchanged(records, checkpoint)
    os.utime(checkpoint / "config.json", (1, 1))
    assert not manifest.unchanged(records, checkpoint)
    (checkpoint / "config.json").unlink()
    assert not manifest.unchanged(records, checkpoint)


def test_another_stage_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="is a checkpoint, and a engine is needed"):
        manifest.read(checkpoint, "engine")


@pytest.mark.parametrize(
    ("text", "named"),
    [(None, "no manifest.json"), ("{", "cannot be read"), ("[]", "schema"), ('{"schema": 99}', "schema"),
     (json.dumps({"schema": 1, "stage": "checkpoint"}), "damaged"),
     (json.dumps({"schema": 1, "stage": "checkpoint", "input": 3, "files": {}}), "damaged")],
)  # fmt: skip
def test_a_bad_manifest_is_named(tmp_path: Path, text: str | None, named: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=named):
        manifest.read(tmp_path, "checkpoint")
