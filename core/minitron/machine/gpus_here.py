"""The NVIDIA GPUs of this machine as processes can use them: whole boards, slices of MIG, virtual ones.

``memory.total`` of nvidia-smi is the board's even where MIG divides it. What a process gets is in its XML report, per
MIG device (mig_mode, mig_devices, gpu_virtualization_mode of nvsmi_device_v12.dtd, driver 575), the profile's name in
``nvidia-smi -L``. Not seen on a machine with MIG; a report that cannot be read counts as one without.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from xml.etree import ElementTree

_QUERY = "--query-gpu=name,memory.total,compute_cap,driver_version"
_PROFILE = re.compile(r"^ +MIG (?P<profile>\S+) +Device +\d+:")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class GpuHere:
    """A GPU that a process can have: a board, or where MIG is on one of its slices.

    ``memory_bytes`` is the slice's then, ``multiprocessors`` too (None for a board: not asked), ``profile`` such as
    "3g.40gb" ("" where not known); ``mig``: whether MIG is on, ``virtual``: whether a hypervisor divides the board.
    A board with MIG on and no slice has no memory that a process could use: 0.
    """

    name: str
    memory_bytes: int
    compute_capability: str
    driver: str
    mig: bool = False
    profile: str = ""
    multiprocessors: int | None = None
    virtual: bool = False

    @property
    def shown(self) -> str:
        """Name, slice and architecture for people."""
        sms = f", {self.multiprocessors} SMs" if self.multiprocessors else ""
        part = f" MIG {self.profile or '(profile not known)'}{sms}" if self.mig else ""
        return f"{self.name}{' vGPU' if self.virtual else ''}{part} ({self.compute_capability})"


def gpus() -> list[GpuHere]:
    """All of them, in nvidia-smi's order; none where nvidia-smi is missing or fails."""
    try:
        boards = [_board(line) for line in _told(_QUERY, "--format=csv,noheader,nounits").splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    try:
        reports = ElementTree.fromstring(_told("-q", "-x")).findall("gpu")
        profiles = iter([match["profile"] for line in _told("-L").splitlines() if (match := _PROFILE.match(line))])
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError):
        return boards
    if len(reports) != len(boards):
        return boards
    return [one for board, report in zip(boards, reports, strict=True) for one in _usable(board, report, profiles)]


def _told(*words: str) -> str:
    told = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    return told.stdout


def _board(line: str) -> GpuHere:
    name, mebibytes, capability, driver = (cell.strip() for cell in line.split(","))
    return GpuHere(name, int(mebibytes) << 20, capability, driver)


def _usable(board: GpuHere, report: ElementTree.Element, profiles: Iterator[str]) -> Iterator[GpuHere]:
    board = replace(board, virtual=report.findtext("gpu_virtualization_mode/virtualization_mode") == "VGPU")
    if report.findtext("mig_mode/current_mig") != "Enabled":
        yield board
        return
    slices = report.findall("mig_devices/mig_device")
    if not slices:
        yield replace(board, mig=True, memory_bytes=0)
    for one in slices:
        processors = one.findtext("device_attributes/shared/multiprocessor_count") or ""
        yield replace(
            board, mig=True, profile=next(profiles, ""), memory_bytes=_mebibytes(one.findtext("fb_memory_usage/total")),
            multiprocessors=int(processors) if processors.isdigit() else None,
        )  # fmt: skip


def _mebibytes(text: str | None) -> int:
    number = (text or "").removesuffix(" MiB")
    return int(number) << 20 if number.isdigit() else 0
