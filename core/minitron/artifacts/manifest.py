"""``manifest.json``: what a folder of ours is, what it was made from, and the hash of every file in it.

One schema for checkpoint, engine and model repository. Each records the digest of the folder that it was made from,
so that the way of the weights can be followed back and checked. TensorRT-LLM and Triton do not read it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minitron import files
from minitron.errors import InputError
from minitron.version import VERSION

NAME = "manifest.json"
SCHEMA = 1
STAGES = ("checkpoint", "engine", "repository")


@dataclass(frozen=True)
class FileRecord:
    """One file: SHA-256 of its bytes, size in bytes, modification time in ns (to skip hashing where nothing moved)."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> FileRecord:
        """Record the file at ``path``; ``sha256`` where the writer knows it already."""
        status = path.stat()
        return cls(sha256 or files.sha256_file(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Input:
    """What a stage was made from: ``kind`` is huggingface, gguf, checkpoint or engine; ``digest`` of its files."""

    kind: str
    path: str
    digest: str
    revision: str | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The record that a stage leaves in the folder it made.

    ``arguments``: what the user asked for. ``details``: what the stage found out and the next one needs (JSON values).
    ``files``: every file of the folder but this one. ``digest``: of those files' names and hashes. ``seal``: SHA-256 of
    this manifest's own text with an empty seal, so that a change to it is found as well.
    """

    stage: str
    input: Input
    arguments: dict[str, Any]
    details: dict[str, Any]
    files: dict[str, FileRecord]
    digest: str
    created: str
    toolkit: str = VERSION
    schema: int = SCHEMA
    seal: str = ""

    def text(self) -> str:
        """The content of the file; reading and writing it again gives the same bytes."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def sealed(self) -> Manifest:
        """The same manifest with the seal that belongs to it."""
        return replace(self, seal=hashlib.sha256(replace(self, seal="").text().encode()).hexdigest())


def digest_of(records: dict[str, FileRecord]) -> str:
    """SHA-256 over "name sha256" lines in the order of the names: equal for equal content, wherever it lies."""
    lines = "".join(f"{name} {records[name].sha256}\n" for name in sorted(records))
    return hashlib.sha256(lines.encode()).hexdigest()


def write(
    folder: Path,
    stage: str,
    made_from: Input,
    *,
    arguments: dict[str, Any],
    details: dict[str, Any],
    known_sha256: dict[str, str] | None = None,
) -> Manifest:
    """Record all files in ``folder`` and write its manifest; call it last, before the folder is put in place.

    ``known_sha256`` maps relative paths to hashes that the writer made on the way, so that no file is read twice.
    """
    assert stage in STAGES
    known = known_sha256 or {}
    names = [name for name in files.tree_files(folder) if name != NAME]
    records = {name: FileRecord.of(folder / name, known.get(name)) for name in names}
    manifest = Manifest(
        stage, made_from, arguments, details, records, digest_of(records),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    ).sealed()  # fmt: skip
    files.write_text(folder / NAME, manifest.text())
    return manifest


def stage_of(folder: Path) -> str:
    """What a folder of ours is, one of STAGES, by its manifest alone; raises InputError."""
    path = folder / NAME
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))["stage"]
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}, so nothing of ours is there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): it was changed after it was written") from error
    if stage not in STAGES:
        raise InputError(f"{path} says stage {stage!r}: it was changed after it was written")
    return str(stage)


def read(folder: Path, stage: str) -> Manifest:
    """Read ``folder``'s manifest and check that it is one of ``stage``; raises InputError."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}, so it is no {stage} made by minitron") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); make the {stage} again") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise InputError(f"{path} has a schema that this version does not know; make the {stage} again")
    if raw.get("stage") != stage:
        raise InputError(f"{folder} is a {raw.get('stage')}, and a {stage} is needed here")
    try:
        made_from = raw.pop("input")
        return Manifest(input=Input(**made_from | {"files": _records(made_from["files"])}),
                        files=_records(raw.pop("files")), **raw)  # fmt: skip
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); make the {stage} again") from error


def intact(folder: Path, stage: str) -> Manifest | None:
    """The manifest of a folder that has every recorded file as it was recorded (see ``unchanged``), else None."""
    try:
        record = read(folder, stage)
    except InputError:
        return None
    return record if unchanged(record.files, folder) else None


def current(folder: Path, stage: str) -> Manifest | None:
    """The manifest of a folder that is ``intact`` and was made by this version of the toolkit, else None.

    The one rule of whether a stage is done, beside what it was made from and with, which is the stage's own to say.
    """
    record = intact(folder, stage)
    return record if record is not None and record.toolkit == VERSION else None


def _records(raw: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in raw.items()}


def input_of(folder: Path, stage: str) -> tuple[Input, Manifest]:
    """The ``Input`` entry that a later stage writes about ``folder``, and that folder's own manifest."""
    manifest = read(folder, stage)
    return Input(kind=stage, path=str(folder), digest=manifest.digest), manifest


def unchanged(records: dict[str, FileRecord], folder: Path) -> bool:
    """Whether every recorded file is still there with its size and time (content is not read)."""
    for name, record in records.items():
        try:
            status = (folder / name).stat()
        except OSError:
            return False
        if (status.st_size, status.st_mtime_ns) != (record.size, record.mtime_ns):
            return False
    return True


def model_unchanged(made_from: Input, model: Path) -> bool:
    """The same of the model that a stage was made from: a folder, or a file among others."""
    return unchanged(made_from.files, model if model.is_dir() else model.parent)
