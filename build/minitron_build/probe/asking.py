"""Running ``inside.py`` where TensorRT-LLM is: in the pinned image, or with the Python that has it here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minitron.errors import MissingDependency, ToolError
from minitron.recipe_model import Container
from minitron_build.engines.tensorrt import container, process

SCRIPT = Path(__file__).with_name("inside.py")
_SCRIPT, _OUTPUT = Path("/probe"), Path("/answers")


@dataclass(frozen=True)
class Place:
    """Where TensorRT-LLM is asked: ``image`` of a container, or None for this machine; ``log`` gets what it prints.

    ``container``: the recipe's section.
    """

    image: str | None
    container: Container
    log: Path
    timeout_s: float | None = None


@contextmanager
def answers(place: Place, what: str, folders: Mapping[str, Path]) -> Iterator[Path]:
    """Run ``inside.py what`` and yield the folder with its answers; ``folders``: name in the container → folder here.

    Raises MissingDependency, ToolError.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-probe-") as scratch:
        output = Path(scratch)
        output.chmod(0o755)
        if place.image is None:
            if shutil.which("trtllm-build") is None:
                raise MissingDependency("trtllm-build is not on PATH; --container asks in NVIDIA's image with docker")
            argv = ["python3", str(SCRIPT), what, *(str(folder.absolute()) for folder in folders.values()), scratch]
            process.run(argv, place.log, cwd=output, timeout_s=place.timeout_s)
        else:
            name = container.new_name("probe")
            argv = container.command(
                ["python3", f"{_SCRIPT}/{SCRIPT.name}", what, *(f"/{name}" for name in folders), str(_OUTPUT)],
                place.image,
                {
                    f"{_SCRIPT}:ro": SCRIPT.parent,
                    **{f"/{name}:ro": folder for name, folder in folders.items()},
                    str(_OUTPUT): output,
                },
                name=name,
                container=place.container,
            )
            process.run(argv, place.log, cwd=output, timeout_s=place.timeout_s, stop=lambda: container.stop(name))
        yield output


def failed(error: ToolError, log: Path) -> str:
    """Why a run failed, for a line: the last thing that it said."""
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return said[-1] if said else str(error)
