"""The one place of the build room that imports OpenVINO, without its analytics.

``import openvino`` queues a usage event and writes a folder into the home directory unless the module
``openvino_telemetry`` cannot be imported; a None in ``sys.modules`` makes that so.
"""

from __future__ import annotations

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402
from openvino import opset6, opset13  # noqa: E402

VERSION = f"openvino {ov.__version__.split('-')[0]}"

__all__ = ["VERSION", "opset6", "opset13", "ov"]
