"""The one place that imports OpenVINO, without its analytics, and the one Core of a process.

``import openvino`` queues a usage event and writes a folder into the home directory unless the module
``openvino_telemetry`` cannot be imported; a None in ``sys.modules`` makes that so.

The CPU plugin of OpenVINO 2026.4 gives the thread that loads it an alternate signal stack (sigaltstack(2)). Where Cores
come and go, the thread can be left with one that is gone, and the process ends without a word at its next signal, a
Ctrl-C or SIGTERM that Python has a handler for. With a Core that stays it does not.
"""

from __future__ import annotations

import sys
from functools import cache

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402
from openvino import opset6, opset13  # noqa: E402

VERSION = f"openvino {ov.__version__.split('-')[0]}"

__all__ = ["VERSION", "opset6", "opset13", "ov", "process_core"]


@cache
def process_core() -> ov.Core:
    """The Core that reads and compiles every model of this process; it lives as long as the process does."""
    return ov.Core()
