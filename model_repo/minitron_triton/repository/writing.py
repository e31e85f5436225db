"""Putting the parts of a repository into a folder: texts from templates, our Python models, links to large files."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import minitron
from minitron.errors import UsageError
from minitron_triton.repository import config_text
from minitron_triton.repository.layout import ModelConfig

_ROOM = Path(__file__).parent.parent
_CORE = Path(minitron.__file__).parent
#: What the models import of ``core``, and so hold a copy of.
_FROM_CORE = (
    "__init__.py",
    *(f"machine/{name}.py" for name in ("__init__", "memory", "cpu_execution", "cpu_head", "cpu_memory", "openvino")),
    *(f"model/{name}.py" for name in ("__init__", "runtime_limits")),
    "text/*.py",
)
_WITH_COPY = ("preprocessing", "postprocessing", "tensorrt_llm", "tensorrt_llm_bls")
_MODELS = _ROOM / "models"
#: The template of the container's compose file.
COMPOSE = "server/docker-compose.yaml.j2"
#: Where a container sees the repository.
CONTAINER_ROOT = "/models"


def root_as_seen(root: str | None, default: str) -> str:
    """The folder of the repository as the server sees it, ``default`` if none was asked for; raises UsageError."""
    seen = default if root is None else root.rstrip("/") or "/"
    if not seen.startswith("/"):
        raise UsageError(f"--root {root} is not absolute, and the server may start in any folder; give an absolute one")
    if why := unbearable(seen, contained=default == CONTAINER_ROOT):
        raise UsageError(f"{'--output' if root is None else '--root'} {seen!r} {why}; choose another folder")
    return seen


def unbearable(root: str, *, contained: bool) -> str | None:
    """Why a server cannot have its repository there, if so: what cannot be written in a config, and in a container,
    where nothing stands between it and the Python backend's unquoted line of shell, all but plain characters."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in root):
        return "holds a control character, or bytes that are no UTF-8"
    if contained and not re.fullmatch(r"[\w%+=,./@-]+", root, re.ASCII):
        return "holds a character that the Python backend in the container does not bear"
    return None


def write_model(folder: Path, model: ModelConfig, sources: str) -> Path:
    """Write config.pbtxt and the version folder from ``models/SOURCES``, its Python files where the backend is Python.

    Returns the version folder. Raises RepositoryError where Triton's protobuf cannot read the config.
    """
    config = config_of(model, sources)
    config_text.parse(config, f"{model.name}/config.pbtxt")  # before anything of it is written
    write(folder / model.name / "config.pbtxt", config)
    version = folder / model.name / "1"
    version.mkdir()
    if model.backend == "python":
        for source in [*(_MODELS / sources).glob("*.py"), *(_MODELS / "shared").glob("*.py")]:
            shutil.copyfile(source, version / source.name)
    if model.backend == "python" and sources in _WITH_COPY:
        for source in (found for pattern in _FROM_CORE for found in sorted(_CORE.glob(pattern))):
            place(source, version / _CORE.name / source.relative_to(_CORE), copy=True)
    return version


def config_of(model: ModelConfig, sources: str) -> str:
    """The text of its config.pbtxt, by the template in ``models/SOURCES``."""
    return render_text(f"models/{sources}/config.pbtxt.j2", model=model)


def render_text(template: str, **values: Any) -> str:
    """The text of one of our templates; a value that it lacks is an error."""
    return str(_templates().get_template(template).render(**values))


@functools.cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_ROOM, _MODELS]), undefined=jinja2.StrictUndefined, autoescape=False,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quoted"] = config_text.quote
    return environment


def write(path: Path, content: str) -> None:
    """Write a text into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def place(source: Path, target: Path, *, copy: bool) -> None:
    """Hard-link ``source`` at ``target``; copy it if asked to, or where a link cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
    shutil.copyfile(source, target)
