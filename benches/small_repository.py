"""A model repository of the small Minitron, made as the demo makes it: convert, build, render."""

from __future__ import annotations

import sys
from pathlib import Path

from minitron import children

SMALL_MODEL = Path(__file__).parent.parent / "models" / "small-minitron"


def small_repository(work: Path, *options: str) -> Path:
    """Make it in ``work``; ``options`` are for ``render``. What the commands say goes to stderr."""
    checkpoint, engine, repository = (work / name for name in ("checkpoint", "engine", "repository"))
    commands: list[tuple[str | Path, ...]] = [
        ("convert", SMALL_MODEL, "--output", checkpoint),
        ("build", checkpoint, "--target", "cpu", "--output", engine),
        ("render", engine, "--output", repository, *options),
    ]
    for words in commands:
        if children.run(*words, stdout=sys.stderr).returncode:
            sys.exit(f"'minitron {words[0]}' failed")
    return repository
