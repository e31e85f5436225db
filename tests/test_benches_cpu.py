"""What ``make bench-cpu`` makes of its rounds, and which sides it loads together.

Expected values: worked out by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import cpu_figures
import cpu_rounds
import pytest
import source_tree
from cpu_rounds import Loadable
from cpu_workload import Workload
from process_memory import MemoryWatch

MODEL = source_tree.ROOT / "models" / "small-minitron"
ROUNDS = [
    {"server": {"ttft_512": 2.0, "one_stream": 30.0}, "bare": {"ttft_512": 1.0, "one_stream": 10.0}},
    {"server": {"ttft_512": 3.0, "one_stream": 20.0}, "bare": {"ttft_512": 2.0, "one_stream": 20.0}},
    {"server": {"ttft_512": 9.0, "one_stream": 40.0}, "bare": {"ttft_512": 3.0, "one_stream": 20.0}},
]


def test_a_ratio_is_the_median_of_each_rounds_own() -> None:
    # TTFT: 2/1, 3/2, 9/3. The ratio of the medians would be 3/2. Tokens/s: 3, 1, 2.
    assert cpu_figures.ratios(ROUNDS) == {
        "server_to_bare": {
            "ttft_512": {"median": 2.0, "least": 1.5, "greatest": 3.0},
            "one_stream": {"median": 2.0, "least": 1.0, "greatest": 3.0},
        }
    }
    assert cpu_figures.summaries(ROUNDS)["server"]["one_stream"] == {"median": 30.0, "least": 20.0, "greatest": 40.0}


def row(**other: Any) -> dict[str, Any]:
    ratio = {"one_stream": {"median": 1.3, "least": 1.0, "greatest": 2.0}}
    return {
        "precision": "int4_weight_only", "execution": "fast", "head": "as_is", "head_asked": "default",
        "speculation": "none",
        "left_out": {"base": "no --base"},
        "ratios": {"server_to_wheel": ratio, "server_to_native": {"one_stream": ratio["one_stream"] | {"median": 1.1}}},
        "figures": {"server": {"peak_private": {"median": 230.0}}},
        "private_expected_bytes": {"weights": 100, "kv_cache": 50, "other": 50},
    } | other  # fmt: skip


def verdicts(found: dict[str, Any], column: str) -> dict[str, tuple[float | None, bool | None]]:
    bars = cpu_figures.bars([found], column)
    return {bar.name.split(", ")[-1]: (bar.measured, bar.met) for bar in bars}


def test_bars_are_those_of_the_machines_instructions() -> None:
    """int4, fast, one stream : llama.cpp's faster one: at least 1.2 with AVX-512, else stated."""
    assert verdicts(row(), "AVX-512")["one_stream : llama.cpp"] == (1.1, False)
    assert verdicts(row(), "AVX2")["one_stream : llama.cpp"] == (1.1, True)
    assert verdicts(row(), "AVX2")["one_stream : base"] == (None, None)
    assert verdicts(row(), "AVX2")["private : expected"] == (1.15, True)  # 230 of 200
    assert verdicts(row(head="int8", head_asked="int8"), "AVX2").keys() == {
        "one_stream : bare", "four_streams : bare", "sixteen_streams : bare", "private : expected"
    }  # fmt: skip
    exact = row(execution="exact", head="screened", head_asked="screened")
    assert {"one_stream : base", "repeating_stream : base"} <= verdicts(exact, "AVX2").keys()


def test_instruction_sets_are_read_from_the_flags_of_the_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8 avx512f_of_others\n")
    assert cpu_figures.instruction_sets(cpuinfo) == ["avx2", "avx512f", "avx512_vnni", "amx_int8"]
    assert cpu_figures.machine_class(["avx2", "avx512f", "avx512_vnni"]) == "AVX-512"
    assert cpu_figures.machine_class(["avx2", "avx512f"]) == "AVX2"


class Told:
    """A side that notes what is asked of it and answers at once."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self.load_s, self.memory = name, log, 1.0, MemoryWatch(0)

    def ask(self, prompts: list[str], tokens: int) -> dict[str, Any]:
        self._log.append(f"{self.name}: {len(prompts)} x {tokens}")
        return {"ttft_s": 0.5, "seconds": 2.0, "tokens": len(prompts) * tokens}


def loadable(name: str, log: list[str], needed_bytes: int = 1) -> Loadable:
    @contextmanager
    def loaded() -> Iterator[Told]:
        log.append(f"+{name}")
        yield Told(name, log)
        log.append(f"-{name}")

    def load() -> AbstractContextManager[Told]:
        return loaded()

    return Loadable(name, load, needed_bytes)


def workload(**other: Any) -> Workload:
    values: dict[str, Any] = {"prompt_tokens": 20, "stream_prompt_tokens": 12, "output_tokens": 8, "streams": (4,)}
    return Workload(MODEL, False, **values | {"repeating": False} | other)


def test_sides_that_fit_together_are_loaded_twice_and_asked_in_turn() -> None:
    log: list[str] = []
    sides = [loadable("one", log), loadable("two", log)]
    found = cpu_rounds.run(cpu_rounds.groups(sides, 2), workload(), 3)
    warm = ["one: 1 x 2", "two: 1 x 2"]
    one, two = (["one: 1 x 1", "one: 4 x 8"], ["two: 1 x 1", "two: 4 x 8"])
    assert log == [
        "+one", "+two", *warm, *one, *two, *two, *one, "-two", "-one",
        "+two", "+one", *warm[::-1], *one, *two, "-one", "-two",
    ]  # fmt: skip
    assert found.rounds[2]["two"] == {"ttft_20": 0.5, "four_streams": 16.0, "peak_private": 0}  # 4 x 8 tokens in 2 s
    assert found.load_s == {"one": [1.0, 1.0], "two": [1.0, 1.0]}


def test_sides_that_do_not_fit_take_turns_in_every_round() -> None:
    log: list[str] = []
    sides = [loadable("one", log, 4), loadable("two", log, 4), loadable("three", log, 4)]
    groups = cpu_rounds.groups(sides, 9)
    assert [[side.name for side in group] for group in groups] == [["one", "two"], ["three"]]
    cpu_rounds.run(groups, workload(), 2)
    loads = [entry for entry in log if entry[0] in "+-"]
    assert loads == [
        "+one", "+two", "-two", "-one", "+three", "-three",
        "+three", "-three", "+two", "+one", "-one", "-two",
    ]  # fmt: skip


def test_the_workload_says_what_it_takes() -> None:
    # 16 streams of 12 + 8 tokens: 0 full blocks of 32 and two more each, twice; one of 20 + 8 needs less.
    assert workload(streams=(1, 16)).kv_tokens == 2 * 16 * 2 * 32
    assert workload().longest == 28
    assert workload(repeating=True).longest == 128 + 8  # the text that repeats itself has at most 128 tokens


@pytest.mark.parametrize("old", [False, True])
def test_an_older_trees_command_line(tmp_path: Path, old: bool) -> None:
    """Version 0.2 (git show 5f623f4:core/minitron_trtllm/cli.py): another module, 'repo render', no room cli/."""
    if not old:
        (tmp_path / "cli").mkdir()
    argv, environment = source_tree.command(tmp_path, "render", "engine")
    expected = ["minitron_trtllm.cli", "repo", "render", "engine", "--max-queue-size", "0"]
    assert argv[2:] == (expected if old else ["minitron_cli", "render", "engine"])
    assert environment["PYTHONPATH"].split(":")[0] == str(tmp_path / "core")
