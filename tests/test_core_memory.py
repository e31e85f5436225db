"""Pages of a mapped file that are given back, as the kernel counts them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from minitron.machine.memory import release_mapped

SIZE = 32 << 20


def resident_of(path: Path) -> int:
    """Bytes of a mapping that are resident (proc(5), smaps)."""
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss:\s+(\d+) kB", Path("/proc/self/smaps").read_text())
    assert found, "not mapped"
    return int(found[1]) * 1024


def test_resident_pages_go_and_the_content_stays(tmp_path: Path) -> None:
    path = tmp_path / "a file with spaces"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = mapped[:]
        assert resident_of(path) == SIZE
        release_mapped(path)
        assert resident_of(path) == 0
        assert mapped[:] == before


def test_what_was_written_to_a_private_mapping_is_not_lost(tmp_path: Path) -> None:
    """MADV_DONTNEED would give the file's bytes back there (madvise(2))."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * SIZE)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:5] = b"bytes"
        release_mapped(path)
        assert mapped[:6] == b"bytesa"


def test_a_file_that_is_not_there_or_not_mapped_is_no_error(tmp_path: Path) -> None:
    release_mapped(tmp_path / "gone")
    release_mapped(tmp_path)
