"""One thing that a check found: where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``file`` within the repository, ``field`` within the file (may be empty)."""

    is_error: bool
    file: str
    field: str
    message: str


def error(file: str, field: str, message: str) -> Finding:
    """Something that cannot work, or works otherwise than it says."""
    return Finding(True, file, field, message)


def warning(file: str, field: str, message: str) -> Finding:
    """Something to know about."""
    return Finding(False, file, field, message)
