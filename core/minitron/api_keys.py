"""Files that hold API keys: those that a server of ours demands, and those that a client sends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minitron.errors import InputError
from minitron.text import credentials

T = TypeVar("T")

log = logging.getLogger(__name__)

#: A key that is demanded has to be hard to guess.
LEAST_LENGTH = 16


def demanded(path: Path) -> list[str]:
    """The keys of a file, one a line, that a server of ours is to demand; raises InputError."""
    keys = _of(path, credentials.api_keys)
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others; 'chmod 600' it", path)
    if any(len(key) < LEAST_LENGTH for key in keys):
        raise InputError(f"{path} holds a key of less than {LEAST_LENGTH} characters; it would soon be guessed")
    return keys


def demanded_alone(path: Path) -> str:
    """The only key of such a file; raises InputError."""
    return _of(path, lambda path: credentials.only(demanded(path), path))


def sent(path: Path) -> str:
    """The key in a file that is sent to a server, which may be another's; raises InputError."""
    return _of(path, credentials.api_key)


def _of(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except ValueError as error:
        raise InputError(str(error)) from error
