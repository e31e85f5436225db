"""What our Triton models have in common around their work: parameters in, one-line errors out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@-]+){2,}/?")
_LONGEST = 500


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The ``parameters`` of a model's config, from the arguments of ``initialize``."""
    raw = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in raw.items()}


def flag(value: str) -> bool:
    """A boolean parameter in the spellings that the C++ backend takes."""
    return value in ("True", "true", "TRUE", "1")


def one_line(message: object) -> str:
    """An error message as a client may see it: one line, no paths of the server, no traceback, not too long."""
    lines = [line.strip() for line in str(message).splitlines()]
    text = next((line for line in lines if line and not line.startswith("Traceback")), type(message).__name__)
    return _PATH.sub("(path)", text)[:_LONGEST]
