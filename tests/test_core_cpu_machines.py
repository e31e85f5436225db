"""Which row of the table of fast mode a machine gets, by the flags that kernels print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cpu_engines
from minitron.machine import cpu_machines
from minitron.machine.cpu_execution import KV_ELEMENT_BYTES
from minitron_build.evaluate.running import RunningEngine
from minitron_cli.main import main

GROUPS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# As /proc/cpuinfo of such machines begins its line of flags (shortened).
ZEN4 = "flags\t\t: fpu vme de sse sse2 avx avx2 avx512f avx512_vnni avx512_bf16\n"
ZEN3 = "flags\t\t: fpu vme de sse sse2 avx avx2\n"
ARM = "Features\t: fp asimd evtstrm aes\n"


@pytest.mark.parametrize(("cpuinfo", "machine"), [
    (ZEN4, "AVX-512 with VNNI"), (ZEN3, "no VNNI"), (ARM, "no VNNI"), ("", "no VNNI"),
])  # fmt: skip
def test_a_machine_gets_the_row_of_its_flags(tmp_path: Path, cpuinfo: str, machine: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: some\n{cpuinfo}\nprocessor\t: 1\n{cpuinfo}")
    assert cpu_machines.this_machine(path).machine == machine
    assert cpu_machines.this_machine(tmp_path / "gone").machine == "no VNNI"


def test_every_row_says_why_and_keeps_its_cache_in_the_bits_that_the_plan_counts() -> None:
    assert cpu_machines.rows()[-1].flags == ()  # for everybody
    assert KV_ELEMENT_BYTES["fast"] < 1.5
    for row in cpu_machines.rows():
        assert row.properties["KV_CACHE_PRECISION"] == "u8"
        assert row.properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"].isdigit()
        assert row.because and row.source


def test_build_takes_the_row_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And another row is another engine: what was built for one machine is not taken for the other's."""
    row = cpu_machines.rows()[0]
    other = {GROUPS: "64", "KV_CACHE_PRECISION": "u8"}
    engine = tmp_path / "engine"
    words = ["build", str(cpu_engines.checkpoint("other", cpu_engines.BF16)), "--target", "cpu", "--execution", "fast"]
    for properties in (row.properties, other):
        made = cpu_machines.CpuMachine("a machine", (), properties, "it is so", "this test")
        monkeypatch.setattr(cpu_machines, "this_machine", lambda made=made: made)
        assert main([*words, "--output", str(engine), "--force"]) == 0
        assert "a machine: it is so" in capsys.readouterr().out
        assert json.loads((engine / "config.json").read_text())["cpu"]["properties"] == properties
        # OpenVINO's own word: what eval measures runs with them too (it once had no groups where the server had 128).
        compiled = RunningEngine(engine)._request.get_compiled_model()
        assert str(compiled.get_property(GROUPS)) == properties[GROUPS]
