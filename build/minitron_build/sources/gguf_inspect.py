"""What is in a GGUF file: for ``minitron inspect``. Any architecture is listed, not only Nemotron."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from minitron import console
from minitron_build.sources.gguf import open_parts
from minitron_build.sources.gguf_file import Value


def inspect(path: Path) -> dict[str, Any]:
    """Metadata, tensors (all parts of a split file) and totals as JSON values; raises ModelError."""
    parts = open_parts(path)
    try:
        tensors: list[dict[str, Any]] = [
            {"file": part.path.name, "name": name, "type": entry.type.name, "shape": list(entry.shape),
             "bits_per_weight": entry.type.bits_per_weight, "bytes": entry.nbytes}
            for part in parts for name, entry in part.entries.items()
        ]  # fmt: skip
        weights = sum(tensor["bytes"] * 8 / tensor["bits_per_weight"] for tensor in tensors)
        total = sum(tensor["bytes"] for tensor in tensors)
        return {
            "version": parts[0].version,
            "metadata": {key: _short(value) for key, value in parts[0].metadata.items()},
            "tensors": tensors,
            "bytes": total,
            "bits_per_weight": total * 8 / weights if weights else None,
        }
    finally:
        for part in parts:
            part.close()


def text(found: dict[str, Any]) -> str:
    """The same as tables."""
    metadata = console.table([[key, str(value)[:80]] for key, value in found["metadata"].items()], ["key", "value"])
    rows = [
        [tensor["name"], tensor["type"], " x ".join(map(str, tensor["shape"])), f"{tensor['bits_per_weight']:.2f}",
         f"{tensor['bytes']:,}"]
        for tensor in found["tensors"]
    ]  # fmt: skip
    tensors = console.table(rows, ["tensor", "type", "shape", "bits per weight", "bytes"])
    kinds = Counter[str]()
    for tensor in found["tensors"]:
        kinds[tensor["type"]] += tensor["bytes"]
    parts = ", ".join(f"{kind} {console.human_bytes(count)}" for kind, count in kinds.most_common())
    share = f", {found['bits_per_weight']:.2f} bits per weight" if rows else ""
    return f"{metadata}\n\n{tensors}\n\n{len(rows):,} tensors, {console.human_bytes(found['bytes'])}{share} ({parts})"


def _short(value: Value) -> Any:
    """A value for people: long arrays by their length."""
    return value if isinstance(value, (bool, int, float, str)) else f"{len(value)} items"
