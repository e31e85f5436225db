"""What ``bench_cpu`` makes of its rounds: medians with their spread, ratios of sides, bars, and a table of them.

A round is a dictionary: side → figure → value. ``ttft_512`` is in seconds (of a prompt of so many tokens), the streams'
figures in output tokens/s by the wall clock from the first request to the last token, prompts included, and
``peak_private`` in bytes: the most anonymous memory that the side's processes had since they were loaded.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bars import Bar

from minitron import console

Round = Mapping[str, Mapping[str, float]]
#: What the server is divided by.
OTHERS = ("bare", "wheel", "native", "base", "torch")
PEAK_PRIVATE, REPEATING = "peak_private", "repeating_stream"
_COUNTED = {1: "one_stream", 4: "four_streams", 16: "sixteen_streams"}
_INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip


def streams_figure(count: int) -> str:
    """The figure of so many streams at once."""
    return _COUNTED.get(count, f"{count}_streams")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def summaries(rounds: Sequence[Round]) -> dict[str, Any]:
    """side → figure → summary over the rounds."""
    return {
        side: {figure: summary([one[side][figure] for one in rounds]) for figure in rounds[0][side]}
        for side in rounds[0]
    }


def ratios(rounds: Sequence[Round]) -> dict[str, Any]:
    """``server_to_SIDE`` → figure → summary of each round's own ratio, for the sides and figures that there are."""
    return {
        f"server_to_{other}": {
            figure: summary([one["server"][figure] / one[other][figure] for one in rounds])
            for figure in rounds[0]["server"]
            if figure in rounds[0][other]
        }
        for other in OTHERS
        if other in rounds[0]
    }


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of this machine that kernels here are written for (proc(5), flags)."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set[str]())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def machine_class(sets: Sequence[str]) -> str:
    """The column of the bars: "AVX-512" with its integer products, else "AVX2"."""
    return "AVX-512" if {"avx512f", "avx512_vnni"} <= set(sets) else "AVX2"


def bars(rows: Sequence[Mapping[str, Any]], column: str) -> list[Bar]:
    """What the rows must reach on a machine of this column; what was not measured has None."""
    return [bar for row in rows for bar in _bars_of(row, 0 if column == "AVX2" else 1)]


_FAST_HEADS = ("default", "screened")
#: Precision and execution ("": any), heads (none: any), other side, figure, and the least that the server's ratio to it
#: may be: with AVX2 alone, with AVX-512. "llama.cpp" is the faster of wheel and native. None: stated, without a bar.
_BARS: tuple[tuple[str, str, tuple[str, ...], str, str, tuple[float | None, float | None]], ...] = (
    ("int4_weight_only", "fast", _FAST_HEADS, "base", "one_stream", (1.1, 1.5)),
    ("int4_weight_only", "fast", _FAST_HEADS, "llama.cpp", "one_stream", (None, 1.2)),
    ("int4_weight_only", "fast", _FAST_HEADS, "llama.cpp", "four_streams", (0.69, 2.5)),
    ("int8_weight_only", "fast", _FAST_HEADS, "llama.cpp", "one_stream", (1.0, 1.4)),
    ("", "exact", (), "base", REPEATING, (1.0, 1.4)),
    ("int4_weight_only", "exact", ("screened",), "base", "one_stream", (1.1, 1.3)),
    ("", "", (), "bare", "one_stream", (0.95, 0.95)),
    ("", "", (), "bare", "four_streams", (0.95, 0.95)),
    ("", "", (), "bare", "sixteen_streams", (0.95, 0.95)),
)
_PRIVATE_LIMIT = 1.15


def _bars_of(row: Mapping[str, Any], column: int) -> Iterator[Bar]:
    name = row_name(row)
    for precision, execution, heads, other, figure, limits in _BARS:
        matches = precision in ("", row["precision"]) and execution in ("", row["execution"])
        if matches and (not heads or {row["head"], row["head_asked"]} & set(heads)):
            measured, conditions = _ratio(row, other, figure)
            yield Bar(f"{name}, {figure} : {other}", measured, limits[column], conditions, at_least=True)
    private = row["figures"]["server"][PEAK_PRIVATE]["median"]
    expected = sum(row["private_expected_bytes"].values())
    parts = ", ".join(f"{part} {console.human_bytes(size)}" for part, size in row["private_expected_bytes"].items())
    yield Bar(f"{name}, private : expected", private / expected, _PRIVATE_LIMIT, parts)


def _ratio(row: Mapping[str, Any], other: str, figure: str) -> tuple[float | None, str]:
    """The median ratio of the server to a side, and what to say of it."""
    sides = ("wheel", "native") if other == "llama.cpp" else (other,)
    found = {side: row["ratios"].get(f"server_to_{side}", {}).get(figure) for side in sides}
    known = {side: ratio for side, ratio in found.items() if ratio}
    if not known:
        reasons = {row["left_out"].get(side, "figure not asked for") for side in sides}
        return None, "; ".join(sorted(reasons))
    side = min(known, key=lambda one: float(known[one]["median"]))  # of tokens/s: the faster peer
    kept = known[side]
    return float(kept["median"]), f"{side}, {kept['least']:.2f} to {kept['greatest']:.2f}"


def row_name(row: Mapping[str, Any]) -> str:
    """As the table calls it."""
    precision = row["precision"].removesuffix("_weight_only")
    drafts = "" if row["speculation"] == "none" else f", {row['speculation']}"
    return f"{precision}, {row['execution']}, head {row['head']}{drafts}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sides' medians and the ratios, a line each."""
    figures = list(rows[0]["figures"]["server"])
    lines = []
    for row in rows:
        name = row_name(row)
        for side, found in row["figures"].items():
            load = row["load_s"][side]["median"]
            peak = console.human_bytes(row["memory_bytes"][side]["peak"])
            lines.append([name, side, f"{load:.1f}", *(_median(found.get(key), key) for key in figures), peak])
        for pair, found in row["ratios"].items():
            cells = [_spread(found.get(key)) for key in figures]
            lines.append([name, pair.replace("_to_", " : "), "", *cells, ""])
        for side, reason in row["left_out"].items():
            lines.append([name, side, "", *("" for _ in figures), reason])
    return console.table(lines, ["engine", "", "load s", *figures, "peak memory"])


def bars_table(found: Sequence[Bar]) -> str:
    """The bars, a line each."""
    return console.table([bar.row() for bar in found], ["figure", "measured", "bar", "verdict", "least to greatest"])


def _median(found: Mapping[str, float] | None, figure: str) -> str:
    if not found:
        return "-"
    return console.human_bytes(found["median"]) if figure == PEAK_PRIVATE else f"{found['median']:.2f}"


def _spread(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['least']:.2f}-{found['greatest']:.2f})" if found else "-"


def machine(packages: Mapping[Path, Sequence[str]]) -> dict[str, Any]:
    """This machine and the versions of what ran on it; ``packages``: names for the Python that has them."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    sets = instruction_sets()
    return {
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": sets,
        "class": machine_class(sets),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for python, names in packages.items() for name, version in _versions(python, names)},
    }


def _versions(python: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    script = "import importlib.metadata, sys\nfor name in sys.argv[1:]: print(importlib.metadata.version(name))"
    argv = [str(python), "-c", script, *names]
    return zip(names, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split(), strict=True)
