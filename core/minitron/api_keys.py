"""Files that hold API keys: those that a server of ours demands, and those that a client sends."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from minitron.errors import InputError

log = logging.getLogger(__name__)

#: A key that is demanded has to be hard to guess.
LEAST_LENGTH = 16
_VISIBLE = re.compile(r"[\x21-\x7e]+")


def demanded(path: Path) -> list[str]:
    """The keys of a file, one a line, that a server of ours is to demand; raises InputError."""
    keys = _read(path)
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others; 'chmod 600' it", path)
    if any(len(key) < LEAST_LENGTH for key in keys):
        raise InputError(f"{path} holds a key of less than {LEAST_LENGTH} characters; it would soon be guessed")
    return keys


def one(keys: list[str], path: Path) -> str:
    """The only key of a file; raises InputError where it holds several."""
    if len(keys) > 1:
        raise InputError(f"{path} must hold one line, the key, and has {len(keys)}")
    return keys[0]


def sent(path: Path) -> str:
    """The key in a file that is sent to a server, which may be another's; raises InputError."""
    return one(_read(path), path)


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as an API key ({error})") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise InputError(f"{path} holds no API key")
    if not all(_VISIBLE.fullmatch(key) for key in keys):
        raise InputError(f"{path} must hold keys of printable ASCII characters without spaces, one a line")
    return keys
