"""One thing that a look at an artifact found: where, what, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Problem:
    """``level`` is OK (looked at, and as it should be), WARNING or ERROR.

    ``file``: its path, within a repository the relative one; ``field`` within the file (may be empty).
    """

    level: str
    file: str
    field: str
    message: str

    @property
    def is_error(self) -> bool:
        """Whether it cannot stay so."""
        return self.level == ERROR


def error(file: str, field: str, message: str) -> Problem:
    """Something that cannot work, works otherwise than it says, or is not what was recorded."""
    return Problem(ERROR, file, field, message)


def warning(file: str, field: str, message: str) -> Problem:
    """Something to know about, or that could not be looked at."""
    return Problem(WARNING, file, field, message)


def as_recorded(file: str, message: str) -> Problem:
    """Something that was looked at and is as recorded."""
    return Problem(OK, file, "", message)
