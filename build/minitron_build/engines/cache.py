"""Which engines are the same: a digest of everything that goes into one, and finding one that is there already.

An engine is taken for what was asked only when its manifest carries the same digest and every file that it records is
in its place with its size and time. A file that merely has the right name never is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minitron.artifacts import manifest
from minitron.errors import OutputExists

ROOT = Path("out") / "engines"
_NAME_DIGITS = 12


@dataclass(frozen=True)
class EngineKey:
    """The ingredients of an engine.

    ``source``: digest of the checkpoint's files. ``plan``: limits, parallelism and all flags of the build. ``runtime``:
    what builds and runs it, with its version ("tensorrt-llm 1.2.1"). ``architecture``: "sm80", or "cpu".
    """

    source: str
    precision: str
    dtype: str
    plan: dict[str, Any] = field(hash=False)
    runtime: str
    architecture: str

    @property
    def digest(self) -> str:
        """SHA-256 over the ingredients as canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What the engine's manifest holds under ``cache``."""
        return asdict(self) | {"digest": self.digest}


def default_output(name: str, key: EngineKey) -> Path:
    """Where an engine goes that was not given a place: ``out/engines/NAME-DIGEST``."""
    return ROOT / f"{name}-{key.digest[:_NAME_DIGITS]}"


def find(folder: Path, key: EngineKey) -> manifest.Manifest | None:
    """The manifest of the engine at ``folder`` if it is complete and what ``key`` asks for, else None."""
    # A TensorRT engine is trtllm-build's work, which may have taken an hour; a CPU engine is all ours.
    record = (manifest.current if key.architecture == "cpu" else manifest.intact)(folder, "engine")
    same = record is not None and (record.details.get("cache") or {}).get("digest") == key.digest
    return record if same else None


def check_free(folder: Path, *, force: bool) -> None:
    """Raise OutputExists where something else than the engine asked for is at ``folder``, unless ``force``."""
    if folder.exists() and not force:
        raise OutputExists(
            f"{folder} holds something else than the engine asked for; give --force to replace it, or another --output"
        )
