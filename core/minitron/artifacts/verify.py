"""Whether a checkpoint, engine or repository still is what its manifest says, and what it was made from as well.

Every recorded file is hashed again; nothing is taken from size and time. The chain is followed from manifest to
manifest as far as the folders are still where they were; the source model's files are the end of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitron import files
from minitron.artifacts import manifest
from minitron.artifacts.manifest import FileRecord, Manifest
from minitron.artifacts.problem import Problem, as_recorded, error, warning
from minitron.errors import InputError

_MADE_BY_RUNNING = "__pycache__"


def verify(folder: Path) -> list[Problem]:
    """Look at ``folder`` and at everything that it was made from."""
    problems: list[Problem] = []
    expected: str | None = None
    while True:
        try:
            record = manifest.read(folder, manifest.stage_of(folder))
        except InputError as wrong:
            return [*problems, error(str(folder / manifest.NAME), "", str(wrong))]
        found = [*_manifest(folder, record, expected), *_files(folder, record.files), *_surplus(folder, record)]
        if not found:
            count = f"{len(record.files)} files, {sum(file.size for file in record.files.values()):,} bytes"
            found = [as_recorded(str(folder), f"{record.stage}: {count}, all as recorded")]
        problems += found
        source = Path(record.input.path)
        if record.input.kind not in manifest.STAGES:
            return [*problems, *_source(source, record)]
        if not (source / manifest.NAME).is_file():
            return [*problems, warning(str(source), "", f"the {record.input.kind} is not here, so not checked")]
        folder, expected = source, record.input.digest


def _manifest(folder: Path, record: Manifest, expected: str | None) -> Iterator[Problem]:
    path = folder / manifest.NAME
    if path.read_text(encoding="utf-8") != record.text() or record.sealed() != record:
        yield error(str(path), "", "was changed after it was written (its seal does not fit)")
    if manifest.digest_of(record.files) != record.digest:
        yield error(str(path), "", "has a digest that is not that of the files it lists")
    if expected is not None and record.digest != expected:
        yield error(str(folder), "", "was made again since; what was made from it is of another one")


def _files(folder: Path, records: dict[str, FileRecord]) -> Iterator[Problem]:
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            yield error(str(path), "", "is missing")
        elif path.stat().st_size != record.size:
            yield error(str(path), "", f"has {path.stat().st_size:,} bytes and had {record.size:,}")
        elif files.sha256_file(path) != record.sha256:
            yield error(str(path), "", "has other bytes than it had (SHA-256 differs)")


def _surplus(folder: Path, record: Manifest) -> Iterator[Problem]:
    for name in files.tree_files(folder):
        if name != manifest.NAME and name not in record.files and _MADE_BY_RUNNING not in name.split("/"):
            yield error(str(folder / name), "", "is not recorded: it was added after the manifest was written")


def _source(source: Path, record: Manifest) -> Iterator[Problem]:
    """The model's own files, where they are still here."""
    base = source if source.is_dir() else source.parent
    if not record.input.files or not source.exists():
        yield warning(record.input.path, "", "the source model is not here, so not checked")
        return
    found = list(_files(base, record.input.files))
    yield from found or [as_recorded(str(source), f"source model: {len(record.input.files)} files, all as recorded")]
