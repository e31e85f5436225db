"""Memory of this machine, and what this process has used of it, in bytes.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

#: What Triton's Python backend needs of /dev/shm at the least: 1 MiB for each process of a model, and room to grow.
LEAST_SHM_BYTES = 32 << 20
_MADV_DONTNEED = 4
#: Limit, usage, statistics, and the key of the page cache in them, of control groups of version 2 and 1.
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)


def limit_bytes(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that processes here may use: the machine's, or the control group's where that is less."""
    limits = [_number(group / limit) for limit, *_ in _GROUP_FILES]
    return min([_machine(proc, "MemTotal"), *(limit for limit in limits if limit is not None)])


def available_bytes(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be taken without swapping: MemAvailable (proc(5)), or what the control group leaves of its limit.

    Page cache counts as used in a control group, but can be dropped.
    """
    found = [_machine(proc, "MemAvailable")]
    for limit, usage, statistics, cache in _GROUP_FILES:
        most, used, cached = _number(group / limit), _number(group / usage), _statistic(group / statistics, cache)
        if most is not None and used is not None and cached is not None:
            found.append(most - used + cached)
    return min(found)


def peak_bytes() -> int:
    """Most bytes that were resident at once in this process, mapped pages included.

    VmHWM where /proc has it (proc(5)): unlike ru_maxrss it does not begin with what the parent process had.
    """
    found = status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def status_bytes(key: str, process: int | str = "self") -> int | None:
    """A figure of a process's status (proc(5): VmHWM, RssAnon); None where it has ended, or there is no /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def release_mapped(path: Path) -> None:
    """Give the pages of a mapped file back that this process has resident; what is read again comes from the file.

    Only of mappings that cannot be written to (proc(5), maps; madvise(2), MADV_DONTNEED), so that nothing can be lost.
    Where that is not possible, nothing happens.
    """
    try:
        wanted, lines = str(path.resolve()), Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in lines:
        span, permissions, _, _, _, *name = line.split(maxsplit=5)
        if name == [wanted] and "w" not in permissions:
            begin, end = (int(address, 16) for address in span.split("-"))
            advise(begin, end - begin, _MADV_DONTNEED)


def _machine(proc: Path, key: str) -> int:
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    """The number in a file of a control group; None where there is no such file, or no limit ("max")."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, key: str) -> int | None:
    try:
        words = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return next((int(value) for name, value in words if name == key), None)
