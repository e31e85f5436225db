"""Facts about this machine, read from the system without installing anything."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit_bytes() -> int:
    """Memory that processes here may use: the machine's, or the control group's where that is less."""
    return min([_meminfo("MemTotal"), *_cgroup_limits()])


def memory_available_bytes() -> int:
    """Memory that could be used now without swapping (MemAvailable of the kernel, within the limit)."""
    return min(_meminfo("MemAvailable"), memory_limit_bytes())


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits() -> list[int]:
    found = []
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return found
