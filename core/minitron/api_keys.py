"""Files that hold API keys: those that a server of ours demands, and those that a client sends."""

from __future__ import annotations

import logging
from pathlib import Path

from minitron.errors import InputError, values_as_input
from minitron.text import credentials

log = logging.getLogger(__name__)

#: A key that is demanded has to be hard to guess.
LEAST_LENGTH = 16


def demanded(path: Path) -> list[str]:
    """The keys of a file, one a line, that a server of ours is to demand; raises InputError."""
    with values_as_input():
        keys = credentials.api_keys(path)
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others; 'chmod 600' it", path)
    if any(len(key) < LEAST_LENGTH for key in keys):
        raise InputError(f"{path} holds a key of less than {LEAST_LENGTH} characters; it would soon be guessed")
    return keys


def demanded_alone(path: Path) -> str:
    """The only key of such a file; raises InputError."""
    with values_as_input():
        return credentials.only(demanded(path), path)


def sent(path: Path) -> str:
    """The key in a file that is sent to a server, which may be another's; raises InputError."""
    with values_as_input():
        return credentials.api_key(path)
