"""Signals of a process that has used OpenVINO: Ctrl-C has to unwind, not to kill.

Python's handlers run on the alternate signal stack where a thread has one (CPython, ``PyOS_setsig``, SA_ONSTACK), and
OpenVINO's CPU plugin brings one along, whose end ``minitron.machine.openvino`` prevents.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import cpu_engines
from conftest import ROOMS, ROOT
from minitron.model.precision import Precision

CODE = """
import gc, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from {module} import *
folder = Path(sys.argv[1])
opened = [{opened} for _ in range(2)]
while opened:
    first = opened.pop(0)  # the first that came goes first
    {close}
    del first
    gc.collect()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("unwound")
"""
ENGINES = {
    "evaluation": ("minitron_build.evaluate.running", "RunningEngine(folder)", ""),
    "tasks": ("minitron_build.evaluate.tasks.prefixes", "PrefixEngine(folder)", ""),
    "server": ("minitron_triton.models.tensorrt_llm.cpu_engine", "Engine.load(folder)", "first.close()"),
    "log probs of prompts": (
        "minitron_triton.models.tensorrt_llm.pipeline",
        "PlainModel(EngineConfig.read(folder))",
        "",
    ),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_ctrl_c_unwinds_after_models_have_come_and_gone(kind: str) -> None:
    engine = cpu_engines.engine("other", Precision.BFLOAT16)
    module, opened, close = ENGINES[kind]
    code = CODE.format(module=module, opened=opened, close=close or "pass")
    words = [sys.executable, "-c", code, str(engine), *(str(ROOT / room) for room in ROOMS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "unwound\n" * 2), done.stderr
