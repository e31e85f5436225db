"""Nodes that every piece of a graph makes: integer constants, and inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import ov


def ints(values: int | list[int] | list[list[int]]) -> Any:
    """A constant of int64, a scalar for a number."""
    return op.constant(np.asarray(values, dtype=np.int64))


def parameter(name: str, rank: int, dtype: Any = None) -> Any:
    """A graph input of unknown sizes, int64 unless ``dtype`` says otherwise.

    Its friendly name equals its tensor's, or the pass to paged attention would add a second one.
    """
    node = op.parameter(ov.PartialShape([-1] * rank), dtype or ov.Type.i64)
    node.set_friendly_name(name)
    node.output(0).set_names({name})
    return node
