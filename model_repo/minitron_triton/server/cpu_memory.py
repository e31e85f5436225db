"""Whether this machine's memory holds a CPU server, asked before anything is started."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.artifacts import manifest
from minitron.console import human_bytes
from minitron.errors import NotEnoughMemory, RepositoryError
from minitron.machine import cpu_memory, memory
from minitron.machine.cpu_memory import Peak, Sizes

log = logging.getLogger(__name__)


def sizes(engine: Path) -> Sizes:
    """Read the engine folder of a CPU engine; raises RepositoryError."""
    try:
        return cpu_memory.read(engine)
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = engine / "config.json"
        raise RepositoryError(f"{where} is no CPU engine's config ({error!r}); render the repository again") from error


def of_engine(
    engine: Path, available: int, *, tokenizer: Path, options: Mapping[str, Any], gateway: bool = False
) -> Peak:
    """What a server takes that is rendered with these options; without a size of its own, its KV cache is what the
    engine chooses of ``available`` bytes, and one sequence at the least. Raises RepositoryError."""
    found = sizes(engine)
    instances = [options.get(f"{name}_instances") or 1 for name in ("preprocessing", "postprocessing")]

    def with_cache(tokens: int) -> Peak:
        size = cpu_memory.tokenizer_bytes(tokenizer)
        return cpu_memory.peak(found, tokens, tokenizer_bytes=size, text_models=1 + sum(instances), gateway=gateway)

    beside = with_cache(0).private - found.engine_bytes
    tokens = options.get("max_tokens_in_paged_kv_cache") or found.kv_tokens(available - beside)
    return with_cache(tokens or found.sequence_tokens)


def of_repository(repository: Path, available: int, *, gateway: bool = False) -> Peak:
    """The same of a rendered repository, by the options in its manifest; raises RepositoryError, InputError."""
    options = manifest.read(repository, "repository").arguments.get("options", {})
    return of_engine(
        repository / "engine", available, tokenizer=repository / "tokenizer", options=options, gateway=gateway
    )


def check(repository: Path, *, gateway: bool = False) -> None:
    """Raise NotEnoughMemory, with the numbers, where a server cannot fit; a warning where it cannot load at ease."""
    free = memory.available_bytes()
    needed = of_repository(repository, free, gateway=gateway)
    others = needed.private - needed.weights - needed.kv_cache
    if needed.private > free:
        raise NotEnoughMemory(
            f"the server will need {human_bytes(needed.private)}: {human_bytes(needed.weights)} for its weights, "
            f"{human_bytes(needed.kv_cache)} for its KV cache and {human_bytes(others)} for its processes and steps, "
            f"and {human_bytes(free)} are free; convert with an int8 or int4 precision, or build with a smaller "
            "--max-seq-len"
        )
    if needed.total > free:
        log.warning(
            "loading takes %s for a moment, the weights' file included, and %s are free: parts of the file will be "
            "read more than once",
            human_bytes(needed.total), human_bytes(free),
        )  # fmt: skip
