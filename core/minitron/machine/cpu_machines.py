"""What fast mode does on which processor: the rows of ``data/cpu_machines.yaml``, and the one of this machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from minitron import data_files
from minitron.machine.cpu_execution import processor_flags

_DATA = "cpu_machines.yaml"


@dataclass(frozen=True)
class CpuMachine:
    """A row: settings of OpenVINO's CPU plugin, and why."""

    machine: str
    flags: tuple[str, ...]
    properties: dict[str, str]
    because: str
    source: str


@functools.cache
def rows() -> tuple[CpuMachine, ...]:
    """All rows, the most particular first; the last one is for every machine."""
    return tuple(CpuMachine(**row | {"flags": tuple(row["flags"])}) for row in data_files.load(_DATA))


def row_of(flags: frozenset[str]) -> CpuMachine:
    """The row of a machine with these flags."""
    return next(row for row in rows() if flags.issuperset(row.flags))


def this_machine(cpuinfo: Path | None = None) -> CpuMachine:
    """The row of this machine, by the flags that its kernel lists; the last row where it lists none."""
    return row_of(processor_flags(cpuinfo))
