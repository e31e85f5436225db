"""How far a model's activations reach, layer by layer, on a text, and whether float16 holds them.

TensorRT-LLM computes squared ReLU as pow(relu(x), 2) in the network's own type: in float16 an output of mlp.fc above
the square root of the largest float16 becomes infinite, and NaN a layer later. Weights alone do not tell, and an engine
that computes in float32 does not show it. ``minitron eval --activations`` measures; ``convert`` and ``plan`` warn.

Source: TensorRT-LLM's ``squared_relu`` (tensorrt_llm/functional.py, 0.15.0.dev2024111200: pow(relu(x), 2.0)); no public
report says whether Minitron's activations get there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import files
from minitron.errors import InputError

FLOAT16_MAX = 65504.0
#: The largest mlp.fc output whose square float16 holds: 255.94, of which float16 itself has 255.875.
FC_MAX = math.sqrt(FLOAT16_MAX)
KINDS = ("fc", "proj", "residual")
_NAMES = {"fc": "mlp.fc", "proj": "mlp.proj", "residual": "the residual"}
_BOUNDS = {"fc": FC_MAX, "proj": FLOAT16_MAX, "residual": FLOAT16_MAX}
_KIND, _SCHEMA, _MOST = "activations", 1, 3


@dataclass(frozen=True)
class Activations:
    """Largest magnitudes of each layer: ``fc`` of mlp.fc's output where it is positive, ``proj`` of mlp.proj's,
    ``residual`` of both sums that the layer adds to. ``model``: digest of the files measured (None: not known).
    """

    fc: tuple[float, ...]
    proj: tuple[float, ...]
    residual: tuple[float, ...]
    model: str | None = None
    about: Mapping[str, Any] | None = None

    def overflows(self) -> list[str]:
        """What float16 would not hold, in words; a value that is no number counts as one."""
        return [
            f"layer {layer}: {_NAMES[kind]} reaches {value:.1f}, and {_BOUNDS[kind]:.1f} is the most"
            for layer, values in enumerate(zip(self.fc, self.proj, self.residual, strict=True))
            for kind, value in zip(KINDS, values, strict=True)
            if not value <= _BOUNDS[kind]
        ]

    def document(self) -> dict[str, Any]:
        """JSON values; what is not finite as a word."""
        layers = [
            {"layer": layer, **{kind: _written(getattr(self, kind)[layer]) for kind in KINDS}}
            for layer in range(len(self.fc))
        ]
        return {"kind": _KIND, "schema": _SCHEMA, "model": self.model, "about": self.about, "layers": layers}

    @classmethod
    def of(cls, document: Any, where: str) -> Activations:
        """What ``document`` wrote; raises InputError."""
        try:
            if document["kind"] != _KIND or document["schema"] != _SCHEMA or not document["layers"]:
                raise ValueError("it is of another kind")
            found = {kind: tuple(float(layer[kind]) for layer in document["layers"]) for kind in KINDS}
            return cls(**found, model=document["model"], about=document["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where} holds no measurement of 'minitron eval --activations' ({error!r})") from error


def read(path: Path | str) -> Activations:
    """A file of ``minitron eval --activations``; raises InputError."""
    try:
        return Activations.of(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a measurement of activations ({error})") from error


def write(path: Path, measured: Activations) -> None:
    """Store a measurement."""
    files.write_text(path, json.dumps(measured.document(), indent=1) + "\n")


def warnings(dtype: str, measured: Activations | None) -> Iterator[str]:
    """What is to be said of activations in ``dtype`` ("float16" or "bfloat16"); nothing of bfloat16."""
    if dtype != "float16":
        return
    if measured is None:
        yield (
            f"activations in float16 were not measured: squared ReLU overflows where an output of mlp.fc passes "
            f"{FC_MAX:.1f}; 'minitron eval --activations FILE' measures, and bfloat16 needs no measuring"
        )
        return
    found = measured.overflows()
    if found:
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        yield f"float16 does not hold this model's activations: {'; '.join(found[:_MOST])}{more}; take bfloat16"


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
