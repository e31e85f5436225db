"""Reading the data files that come with the toolkit."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def load(name: str) -> Any:
    """The content of ``data/NAME``, a YAML or JSON file; raises FileNotFoundError."""
    text = (resources.files("minitron") / "data" / name).read_text(encoding="utf-8")
    if name.endswith(".json"):
        return json.loads(text)
    from minitron import documents

    return documents.parse(text, name)


def names(folder: str) -> list[str]:
    """Names, without their ending, of the files in ``data/FOLDER``."""
    items = (resources.files("minitron") / "data" / folder).iterdir()
    return sorted(item.name.rpartition(".")[0] for item in items)
