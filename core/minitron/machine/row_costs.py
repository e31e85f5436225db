"""What one more row costs in a step of the CPU engine, by what the processor can do.

A step reads all weights once, whatever it computes, and calculates for each row, which is a token of a stream: it takes
1 + cost x rows, in units of the part that does not depend on rows. A table, not a measurement at the start: a server
starts while its machine is busy.

Uses the standard library alone: a rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

#: Exact execution, float32 arithmetic. From steps of four rows to steps of one, on two cores each: AVX-512 1.3 (int8)
#: to 1.4 (int4) times as long, AVX2 2.2 to 2.9 times.
EXACT = {"avx512f": 0.14, "avx2": 1.0}

#: Fast execution: integer products where the processor has them (AVX-512: 130 and 138 ms for one and four rows).
FAST = {"avx512_vnni": 0.02, "avx512f": 0.14, "avx2": 1.0}


def row_cost(*, exact: bool, flags: frozenset[str]) -> float:
    """The cost of a row for a processor with these flags; that of AVX2 where it is not known."""
    costs = EXACT if exact else FAST
    return next((cost for flag, cost in costs.items() if flag in flags), costs["avx2"])


def processor_flags() -> frozenset[str]:
    """What the kernel says the processor can do (proc(5), flags); nothing where it does not say."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
