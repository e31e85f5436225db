"""What this machine can do for a recipe: every requirement looked at, with the remedy where it is not met.

A check that the recipe's target needs fails; one that only another target needs is a warning.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minitron import data_files, extras
from minitron.console import human_bytes
from minitron.errors import MachineError
from minitron.machine import compat, docker, gpus_here, memory
from minitron.machine import gpu as gpus
from minitron.machine.compat import Image, version_key
from minitron.machine.gpu import Gpu
from minitron.machine.gpus_here import GpuHere
from minitron.model import shape
from minitron.model.precision import Precision
from minitron.recipe_model import Recipe
from minitron.text import packages
from minitron_build.engines.tensorrt import container
from minitron_build.plan import engine_plan, model
from minitron_triton.repository.options import from_recipe
from minitron_triton.server import cpu_memory

OK, WARN, FAIL = "OK", "WARN", "FAIL"
_BASE = ("numpy", "ml-dtypes", "jinja2", "tritonclient", "tokenizers", "huggingface-hub", "pydantic", "pyyaml")
_CPU = ("openvino", "openvino-genai", "nvidia-pytriton", "transformers")
#: Checkpoint, engine and the model itself are each about as large as the weights.
_COPIES_ON_DISK = 3
_IMAGE_PACKAGES = "image packages"
_DERIVE = (
    "where a package is missing, 'minitron serve DIR --dockerfile' prints two lines that derive an image with all of "
    "them, and --image (container.image) names it"
)
#: A container's start, and its entrypoint's.
_CONTAINER_S = 120
#: Boards of one kind report a little less memory than others, by ECC and firmware.
_MOSTLY = 0.995


@dataclass(frozen=True)
class Requirement:
    """One requirement: ``level`` OK, WARN or FAIL; ``remedy`` is empty where nothing is to be done."""

    subject: str
    level: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and what follows from them."""

    checks: list[Requirement]
    can: list[str]
    cannot: list[str]

    @property
    def healthy(self) -> bool:
        """Whether nothing that the recipe needs is missing."""
        return not any(check.level == FAIL for check in self.checks)


def diagnose(recipe: Recipe, folder: Path, engine: Path | None = None) -> Diagnosis:
    """Check this machine for ``recipe``, or for the CPU engine that was built by it, working in ``folder``.

    Raises UsageError for a recipe that cannot be, RepositoryError for an engine that is none.
    """
    image = compat.image(recipe.container.image_tag)
    on_cpu = recipe.target == "cpu"
    base = [
        _python(),
        *_libraries(_BASE, FAIL, extras.install()),
        _memory(recipe, engine),
        _disk(recipe, folder),
    ]
    served = [_shm(), *_ports(recipe)]
    cpu = [*_libraries(_CPU, FAIL, extras.install("cpu")), _bundled_server(), _system()]
    gpu = list(_gpu(recipe, image))
    local, in_docker = _trtllm_build(), [*_container(), *_image_packages(recipe)]
    cpu_works, gpu_works = _works(cpu), _works(gpu) and (_works(in_docker) or local.level == OK)
    if local.level == OK:  # in the image itself, or beside a TensorRT-LLM of one's own: no docker is needed
        in_docker = [_softened(check) for check in in_docker]
    needed, others = (
        ([*base, *served, *cpu], [*gpu, *in_docker]) if on_cpu else ([*base, *served, *gpu, *in_docker], cpu)
    )
    checks = [*needed, *(_softened(check) for check in others), local]
    return Diagnosis(checks, *_summary(recipe, _works(base), cpu_works, gpu_works))


def _summary(recipe: Recipe, base: bool, cpu: bool, gpu: bool) -> tuple[list[str], list[str]]:
    gpu_target = "a100 targets" if recipe.target == "cpu" else recipe.target
    parts = [
        (base, "plan, convert, inspect, render, check, and the client"),
        (base and cpu, "build and serve for target cpu (OpenVINO in the bundled Triton)"),
        (base and gpu, f"build and serve for {gpu_target} (TensorRT-LLM)"),
    ]
    return [name for works, name in parts if works], [name for works, name in parts if not works]


def _works(checks: list[Requirement]) -> bool:
    return not any(check.level == FAIL for check in checks)


def _softened(check: Requirement) -> Requirement:
    return replace(check, level=WARN) if check.level == FAIL else check


def _judge(met: bool, subject: str, message: str, remedy: str, *, otherwise: str = FAIL) -> Requirement:
    return Requirement(subject, OK, message) if met else Requirement(subject, otherwise, message, remedy)


def _python() -> Requirement:
    version = platform.python_version()
    met = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return _judge(met, "python", version, "use Python 3.10, 3.11 or 3.12")


def _libraries(names: tuple[str, ...], otherwise: str, remedy: str) -> Iterator[Requirement]:
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    subject = "libraries" if names is _BASE else "cpu libraries"
    message = f"missing: {', '.join(missing)}" if missing else ", ".join(names)
    yield _judge(not missing, subject, message, remedy, otherwise=otherwise)


def _weight_bytes(recipe: Recipe) -> int:
    """About what the weights take: the published model's, in the recipe's precision."""
    published = shape.from_config(data_files.load(f"models/{recipe.model.published_shape}.json"), "published sizes")
    tables = 2 * published.vocab_size * published.hidden_size
    bits = 16 if recipe.precision == "auto" else Precision(recipe.precision).weight_bits
    return 2 * tables + (published.parameters - tables) * bits // 8


def _memory(recipe: Recipe, engine: Path | None) -> Requirement:
    available = memory.available_bytes()
    if recipe.target == "cpu":
        return _cpu_memory(recipe, engine, available)
    weights = _weight_bytes(recipe)
    message = f"{human_bytes(available)} available, {human_bytes(weights)} of weights in this recipe"
    remedy = f"about {human_bytes(weights)} are comfortable; a smaller model needs less"
    return _judge(available >= weights, "memory", message, remedy, otherwise=WARN)


def _cpu_memory(recipe: Recipe, engine: Path | None, available: int) -> Requirement:
    """Whether a CPU server fits, of the engine where there is one; a recipe's may never be built here."""
    if engine:
        needed = cpu_memory.of_engine(engine, available, tokenizer=engine / "tokenizer", options={})
    else:
        planned = engine_plan.plan(recipe, model.look_up(recipe.model), capacity_bytes=available)
        assert planned.memory.cpu_peak
        needed = planned.memory.cpu_peak
    message = (
        f"{human_bytes(available)} available; a server will take {human_bytes(needed.total)} at its peak, "
        f"{human_bytes(needed.private)} of it private with {human_bytes(needed.kv_cache)} of KV cache"
    )
    if needed.private > available or not needed.kv_cache:
        remedy = "a smaller model or limits.max_seq_len, int8 or int4 weights need less"
        return Requirement("memory", FAIL if engine else WARN, message, remedy)
    remedy = "it will load slowly, as parts of the weights' file are read more than once"
    return _judge(needed.total <= available, "memory", message, remedy, otherwise=WARN)


def _disk(recipe: Recipe, folder: Path) -> Requirement:
    free, needed = shutil.disk_usage(folder).free, _COPIES_ON_DISK * _weight_bytes(recipe)
    message = f"{human_bytes(free)} free in {folder}"
    remedy = f"model, checkpoint and engine take about {human_bytes(needed)}; a smaller model takes less"
    return _judge(free >= needed, "disk", message, remedy, otherwise=WARN)


def _shm() -> Requirement:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Requirement(
            "shared memory", FAIL, "/dev/shm is not there", "Triton's Python backend needs it: mount a tmpfs"
        )
    remedy = f"Triton's Python backend wants {human_bytes(memory.LEAST_SHM_BYTES)}; give a container --shm-size"
    return _judge(free >= memory.LEAST_SHM_BYTES, "shared memory", f"{human_bytes(free)} free in /dev/shm", remedy)


def _ports(recipe: Recipe) -> Iterator[Requirement]:
    serving = recipe.serving
    for name, port in (("grpc", serving.grpc_port), ("http", serving.http_port), ("metrics", serving.metrics_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                yield Requirement(f"{name} port", OK, f"{port} is free" if port else "a free one will be taken")
            except OSError as error:
                yield Requirement(f"{name} port", WARN, f"{port} cannot be had ({error.strerror})",
                            f"give 'minitron serve' another --{name}-port, or 0 for a free one")  # fmt: skip


def _bundled_server() -> Requirement:
    spec = importlib.util.find_spec("pytriton")
    found = spec is not None and spec.origin is not None
    program = Path(spec.origin).parent / "tritonserver" / "bin" / "tritonserver" if spec and spec.origin else None
    met = found and program is not None and os.access(program, os.X_OK)
    message = f"tritonserver {compat.fact('bundled')['server']}" if met else "not here"
    return _judge(met, "bundled Triton", message, extras.install("cpu"))


def _system() -> Requirement:
    here = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}"
    problem = compat.bundled_problem()
    return _judge(problem is None, "system", here, problem or "")


def _gpu(recipe: Recipe, image: Image) -> Iterator[Requirement]:
    here = gpus_here.gpus()
    if not here:
        yield Requirement(
            "GPU", FAIL, "none that nvidia-smi shows", "an A100 target is built and served on a machine with one"
        )
        return
    wanted = gpus.find("a100-80gb" if recipe.target == "cpu" else recipe.target)
    needed = recipe.tensor_parallel * recipe.pipeline_parallel
    names = ", ".join(sorted({each.shown for each in here}))
    fitting = [each for each in here if each.compute_capability == wanted.compute_capability]
    yield _judge(len(fitting) >= needed, "GPU", f"{len(here)} x {names}",
                 f"{wanted.target} needs {needed} with compute capability {wanted.compute_capability}: "
                 "choose the target of this GPU, or another machine")  # fmt: skip
    yield from _gpu_memory(wanted, here)
    driver = here[0].driver
    yield _judge(version_key(driver) >= version_key(image.least_driver), "driver", driver,
                 f"CUDA {image.cuda} of {image.tag} needs {image.least_driver}: update it, or set container.image_tag "
                 f"to {compat.fact('older_driver')}")  # fmt: skip


def _gpu_memory(wanted: Gpu, here: list[GpuHere]) -> Iterator[Requirement]:
    """What a process gets: of a divided board a slice, which is less than nvidia-smi's first table says."""
    memory, remedy = min(each.memory_bytes for each in here), "choose a smaller target"
    divided = [each for each in here if each.mig]
    if divided:
        targets = [one.target for one in gpus.slices() if one.target.endswith(f"-{divided[0].profile}")]
        remedy = f"MIG is on: choose the slice's own target ({', '.join(targets) or 'none is known'}), or turn MIG off"
    if not memory:
        remedy = (
            "MIG is on and has no instance: 'nvidia-smi mig -cgi PROFILE -C' makes one, 'nvidia-smi -mig 0' ends it"
        )
    if any(each.virtual for each in here):
        remedy += "; a vGPU has the memory of its profile, and shares its time with others"
    # A slice of another size than planned ends in CUDA out of memory at load, so that it is no mere warning.
    yield _judge(memory >= _MOSTLY * wanted.memory_bytes, "GPU memory", human_bytes(memory),
                 f"{wanted.target} was planned with {human_bytes(wanted.memory_bytes)}: {remedy}",
                 otherwise=FAIL if divided or not memory else WARN)  # fmt: skip


def _container() -> Iterator[Requirement]:
    if shutil.which("docker") is None:
        yield Requirement("docker", FAIL, "not installed", "install docker and NVIDIA's container toolkit")
        return
    try:
        docker.check_is_here()
    except MachineError as error:
        yield Requirement("docker", FAIL, "on another machine", str(error))
        return
    version = _asked("docker", "version", "--format", "{{.Server.Version}}")
    if not version:
        yield Requirement("docker", FAIL, "its daemon does not answer", "start it, or join the group docker")
        return
    yield Requirement("docker", OK, version)
    runtimes = _asked("docker", "info", "--format", "{{json .Runtimes}}") or ""
    met = '"nvidia"' in runtimes or shutil.which("nvidia-ctk") is not None
    yield _judge(met, "NVIDIA runtime", "known to docker" if met else "not known to docker",
                 "install NVIDIA's container toolkit and run 'nvidia-ctk runtime configure'")  # fmt: skip


def _image_packages(recipe: Recipe) -> Iterator[Requirement]:
    """Whether the image that serves has what the models around a TensorRT engine import: it is asked, never pulled."""
    if recipe.target == "cpu" or recipe.backend != "engine":
        return
    name = from_recipe(recipe).serving_image
    if shutil.which("docker") is None:
        yield Requirement(_IMAGE_PACKAGES, WARN, "not looked at, as there is no docker to ask the image", _DERIVE)
    elif _asked("docker", "image", "inspect", name) is None:
        yield Requirement(
            _IMAGE_PACKAGES, WARN, f"not looked at, as {name} is not on this machine", f"docker pull {name}"
        )
    else:
        yield _asked_packages(name, recipe)


def _asked_packages(image: str, recipe: Recipe) -> Requirement:
    question = Path(packages.__file__).read_text(encoding="utf-8") + "\nimport json\nprint(json.dumps(missing()))\n"
    argv = container.command(
        ["python3", "-c", question], image, {}, name=container.new_name("packages"), container=recipe.container
    )
    said = (_asked(*argv, timeout_s=_CONTAINER_S) or "").rpartition("\n")[2]  # behind the banner of the entrypoint
    try:
        absent = [str(package) for package in json.loads(said)]
    except (ValueError, TypeError):
        return Requirement(_IMAGE_PACKAGES, WARN, f"not looked at, as Python in {image} did not answer", _DERIVE)
    message = f"{image} lacks {', '.join(absent)}" if absent else f"{', '.join(packages.PACKAGES)} in {image}"
    return _judge(not absent, _IMAGE_PACKAGES, message, _DERIVE)


def _trtllm_build() -> Requirement:
    met = shutil.which("trtllm-build") is not None
    remedy = "not needed: 'minitron build --container' runs it in the image"
    return _judge(met, "trtllm-build", "on PATH" if met else "not on PATH", remedy, otherwise=WARN)


def _asked(*argv: str, timeout_s: float = 30) -> str | None:
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
