"""What goes on while a server loads: how many models are there, and how many bytes of the weights are packed.

OpenVINO 2026.4.1 tells of neither: its CPU plugin packs the weights in the first inference and has no callback for it.
But it packs into private memory of the engine's process, which grows by what is packed.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from minitron.console import human_bytes
from minitron.errors import RepositoryError
from minitron.machine.cpu_memory import Sizes
from minitron.machine.memory import status_bytes
from minitron_triton.server import cpu_memory, leftovers
from minitron_triton.server.launch import Served

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_ENGINE_PROCESS = "tensorrt_llm_0_0"
_BAR = "{desc}, {elapsed}"


class Packing:
    """The weights of a CPU engine, and how many bytes of them its process has packed."""

    def __init__(self, sizes: Sizes, mark: str) -> None:
        self.total, self._mark = sizes.weight_bytes, mark
        self._before = sizes.engine_bytes - sizes.weight_bytes - sizes.step_bytes
        self._pid: int | None = None

    @classmethod
    def of(cls, served: Served, mark: str) -> Packing | None:
        """Of a served CPU engine; None where there is none."""
        if served.backend != "python" or not served.engine.is_dir():
            return None
        try:
            return cls(cpu_memory.sizes(served.engine), mark)
        except RepositoryError:
            return None  # what is wrong with it, the model says

    def find(self) -> None:
        """Look for the process, where it is not known yet: all of /proc is read for it."""
        if self._pid is None and (process := leftovers.stubs(self._mark).get(_ENGINE_PROCESS)):
            self._pid = process.pid

    def bytes(self) -> int:
        """Packed so far."""
        private = status_bytes("RssAnon", self._pid) if self._pid else None
        return 0 if private is None else min(self.total, max(0, private - self._before))


class Progress:
    """A line that changes in place on a terminal; elsewhere one for each model, and one every few seconds for bytes."""

    def __init__(self, models: int, packing: Packing | None) -> None:
        self._models, self._packing = models, packing
        self._loaded, self._packed, self._last_line = -1, 0, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._models, leave=False, bar_format=_BAR)
        return self

    def show(self, loaded: int) -> None:
        """Say how far it is, where there is something new to say."""
        packed = self._packing.bytes() if self._packing else 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(self.line(loaded, packed))
        elif loaded != self._loaded or (packed != self._packed and now - self._last_line > _SECONDS_BETWEEN_LINES):
            log.info("%s", self.line(loaded, packed))
            self._loaded, self._packed, self._last_line = loaded, packed, now

    def line(self, loaded: int, packed: int) -> str:
        """How far it is, in words."""
        models = f"loading models: {loaded} of {self._models}"
        if not self._packing or not packed:
            return models
        return f"{models}, {human_bytes(packed)} of {human_bytes(self._packing.total)} of weights packed"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
