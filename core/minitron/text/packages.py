"""What the models around a TensorRT engine import beyond Python, and what brings it where it is missing.

They run in NVIDIA's image, which has numpy and tokenizers by TensorRT-LLM's own requirements. tritonclient and gRPC
stand in TensorRT-LLM's triton_backend/requirements.txt (1.2), and whether the released image installs that file was not
seen. So the models look before they load, ``minitron doctor`` runs this file inside the image (it needs Python alone),
and a Dockerfile of two lines derives an image that has everything.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterable

#: Modules by what pip is told to get them, which is what pyproject.toml says too.
PACKAGES = {
    "numpy>=1.24": ("numpy",),
    "tokenizers>=0.20": ("tokenizers",),
    "tritonclient[grpc]>=2.50": ("tritonclient", "grpc", "google.protobuf"),
}
#: What a model needs that only turns text into ids and back.
TOKENIZING = ("numpy>=1.24", "tokenizers>=0.20")


def missing(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those whose modules are not all here."""
    return [package for package in packages if not all(map(_is_here, PACKAGES[package]))]


def check(packages: Iterable[str] = PACKAGES) -> None:
    """Raise ImportError, with what to do, where one is missing."""
    if absent := missing(packages):
        raise ImportError(
            f"{', '.join(absent)} is not installed where this model runs: pip install it there; in NVIDIA's image, "
            "'minitron serve DIR --dockerfile' prints the two lines that derive one with it, and 'minitron serve DIR "
            "--image NAME:TAG' serves in that"
        )


def dockerfile(image: str) -> str:
    """Two lines that derive from ``image`` one that has all of them; pip leaves alone what is there already."""
    # Ubuntu 24.04's pip installs beside the system's packages only when told so; an older one ignores the variable.
    install = f"PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir {shlex.join(PACKAGES)}"
    return f"FROM {image}\nRUN {install}\n"


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False
