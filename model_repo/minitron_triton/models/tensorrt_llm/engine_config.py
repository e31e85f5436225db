"""What the engine folder says about itself in its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minitron.machine.cpu_execution import properties
from minitron.machine.cpu_memory import kv_bytes_per_token


@dataclass(frozen=True)
class EngineConfig:
    """Limits and sizes of a CPU engine; lengths in tokens."""

    folder: Path
    vocab_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    execution: str
    properties: dict[str, str]
    kv_bytes_per_token: float

    @classmethod
    def read(cls, folder: Path) -> EngineConfig:
        """Read ``folder``/config.json; raises ValueError where it is not that of a CPU engine."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            limits, model = raw["build_config"], raw["pretrained_config"]
            return cls(
                folder=folder,
                vocab_size=model["vocab_size"],
                max_batch_size=limits["max_batch_size"],
                max_input_len=limits["max_input_len"],
                max_seq_len=limits["max_seq_len"],
                max_num_tokens=limits["max_num_tokens"],
                execution=raw["cpu"]["execution"],
                properties=properties(raw),
                kv_bytes_per_token=kv_bytes_per_token(raw),
            )
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is not of an engine that 'minitron build --target cpu' made ({error!r})"
            ) from error
