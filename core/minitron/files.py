"""Writing so that nothing is ever half there, and reading so that what was written can be checked.

A result is written into a hidden folder beside its final place, flushed to the disk, and renamed. Whoever sees the
final name sees all of it. A run that was killed leaves only a hidden ``.NAME.partial-*`` folder, which the next run of
the same output removes (a lock tells a dead run's folder from a living one's).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.errors import InputError, NoSpace, OutputError, OutputExists

_CHUNK_BYTES = 4 << 20


@contextmanager
def new_folder(path: Path, *, force: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    An existing ``path`` is refused unless ``force``; then it is replaced in one step, and only on success.
    ``needed_bytes`` is what the block is going to write; less free space than that is refused before it starts.

    Raises OutputExists, NoSpace, OutputError.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists already; give --force to replace it, or another --output")
    partial, lock = _make_partial(path)
    try:
        _check_space(partial, needed_bytes)
        yield partial
        sync_tree(partial)
        _put_in_place(partial, path, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left on the disk of {path.parent}; nothing was written") from error
        raise
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _make_partial(path: Path) -> tuple[Path, int]:
    """Create the hidden folder beside ``path``, locked for as long as the returned descriptor is open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_partials(path)
        while True:
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Another run may have taken it for a dead one's before it was locked: then there is another try.
                if partial.exists():
                    partial.chmod(0o777 & ~_umask())
                    return partial, lock
                os.close(lock)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(f"cannot write into {path.parent}: {error.strerror}; choose another --output") from error


def _remove_dead_partials(path: Path) -> None:
    """Remove what killed runs of the same output left: folders that nobody has locked any more."""
    for old in path.parent.glob(f".{path.name}.partial-*"):
        try:
            lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise NoSpace(
            f"{folder.parent} has {free:,} bytes free and {needed_bytes:,} are needed; "
            "free some space or choose another --output"
        )


def _put_in_place(partial: Path, path: Path, force: bool) -> None:
    if os.path.lexists(path):
        if not force:
            raise OutputExists(f"{path} appeared while it was being made; give --force to replace it")
        _exchange(partial, path)  # what was there is now at `partial`, and goes with it
    else:
        os.rename(partial, path)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (renameat2 with RENAME_EXCHANGE); two renames where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(one.name + "-old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself, to the disk."""
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(base, name)):
                _sync(Path(base, name))
        _sync(Path(base))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: the old content or the new, never a mixture."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """A text as it is in the file, every byte of it: ends of lines stay what they are. Raises InputError."""
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def decoded(text: bytes, where: str) -> str:
    """UTF-8 as it was read from ``where``; raises InputError."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (at byte {error.start})") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def tree_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files below ``folder`` (links are followed), sorted."""
    found = []
    for base, _, names in os.walk(folder, followlinks=True):
        found += [Path(base, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)
