"""Which versions go together, read from data/compat.yaml, and the refusal of combinations that cannot work.

An engine runs only under the TensorRT-LLM and on the compute capability that it was built with: anything else ends
while loading, in "incompatible device" or in a version tag that does not match.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from minitron import data_files
from minitron.errors import UsageError
from minitron.machine.gpu import architecture_of

_LLMAPI = "use --backend llmapi, which needs no engine ('minitron render MODEL --backend llmapi')"


@dataclass(frozen=True)
class Image:
    """A Triton image with TensorRT-LLM and the versions in it; ``server`` is None where it was not looked up."""

    tag: str
    server: str | None
    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: str
    engine_path: bool

    @property
    def reference(self) -> str:
        """What docker calls it."""
        return f"{_data()['repository']}:{self.tag}"

    @property
    def least_driver(self) -> str:
        """The oldest NVIDIA driver under which its CUDA runs."""
        return str(_data()["least_driver"][self.cuda.partition(".")[0]])


def images() -> list[Image]:
    """All images known, newest first."""
    return [Image(**row) for row in _data()["images"]]


def image(tag: str | None = None) -> Image:
    """The image of a tag, by default the newest that has an engine path; raises UsageError."""
    wanted = tag or str(_data()["default"])
    for each in images():
        if each.tag == wanted:
            return each
    raise UsageError(
        f"image tag {wanted} is not in compat.yaml, so the versions in it are not known; "
        f"{_data()['default']} is the newest that is, {_data()['fallback']} the fallback"
    )


def fact(name: str) -> Any:
    """A top-level entry of compat.yaml, such as ``bundled`` or ``older_driver``."""
    return _data()[name]


def bundled_problem() -> str | None:
    """Why the bundled Triton cannot run on this kind of machine, and what to do, if so: glibc by the wheel's tag."""
    bundled = _data()["bundled"]
    here, wanted = (platform.system(), platform.machine()), (bundled["system"], bundled["machine"])
    if here != wanted:
        return f"the bundled Triton has been run on {' '.join(wanted)} alone, and this is {' '.join(here)}"
    (name, version), least = platform.libc_ver(), str(bundled["least_glibc"])
    if name != "glibc" or version_key(version) < version_key(least):
        return (
            f"the bundled Triton needs glibc {least} or newer and this is {name or 'another C library'} {version}; "
            "use Debian 12, Ubuntu 22.04 or newer, or a container of one of them"
        )
    return None


def check_can_build(builder: Image) -> None:
    """Raise UsageError where an image's TensorRT-LLM has no engine path any more."""
    if not builder.engine_path or not has_engine_path(builder.tensorrt_llm):
        raise UsageError(f"TensorRT-LLM {builder.tensorrt_llm} ({builder.tag}) has no engine path; {_LLMAPI}")


def check_engine(details: Mapping[str, Any], where: str, server: Image, compute_capability: str | None = None) -> None:
    """Raise UsageError where an engine cannot run in image ``server``, or on a GPU of ``compute_capability``.

    ``details`` are those of the engine's manifest: ``tensorrt_llm`` its version, ``architecture`` such as "sm80". CPU
    engines, which have neither, run anywhere.
    """
    version, architecture = details.get("tensorrt_llm"), details.get("architecture")
    if version is None:
        return
    if not has_engine_path(server.tensorrt_llm):
        raise UsageError(f"TensorRT-LLM {server.tensorrt_llm} of image {server.tag} runs no engine; {_LLMAPI}")
    if not same_version(version, server.tensorrt_llm):
        fitting = [each.tag for each in images() if same_version(each.tensorrt_llm, version)]
        raise UsageError(
            f"{where} was built with TensorRT-LLM {version} and image {server.tag} has {server.tensorrt_llm}; "
            f"build it again in that image{f', or serve it in {fitting[0]}' if fitting else ''}"
        )
    if compute_capability is not None and architecture != architecture_of(compute_capability):
        raise UsageError(
            f"{where} was built for {architecture} and this GPU has compute capability {compute_capability}; "
            "build it again for this GPU's target"
        )


def has_engine_path(tensorrt_llm: str) -> bool:
    """Whether that version of TensorRT-LLM builds and runs engines."""
    return version_key(tensorrt_llm) < version_key(str(_data()["engine_path_ends_before"]))


def same_version(one: str, other: str) -> bool:
    """Whether two versions of TensorRT-LLM mean the same release, whatever else their builders wrote behind it.

    The container of a month may add its release ("1.0.3.2510" in 25.11, which Triton's table calls 1.0.3), a wheel a
    local part ("1.2.1+cuda13"). Candidates and development versions are releases of their own.
    """
    found = [_RELEASE.match(version) for version in (one, other)]
    meant = [match and (match["number"], match["before"] or "") for match in found]
    return one == other or (None not in meant and meant[0] == meant[1])


_RELEASE = re.compile(r"(?P<number>\d+\.\d+\.\d+)\.?(?P<before>(?:a|b|rc|dev)\d+)?(?![0-9a-z])")


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: "1.3.0rc21" is (1, 3, 0)."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


@cache
def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = data_files.load("compat.yaml")
    return loaded
