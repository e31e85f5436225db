"""A stand-in for docker on a machine with an A100: ``version``, ``info``, ``run`` and ``kill``.

A container that runs trtllm-build or Python is played by ``docker.py``, with the packages in ``image/`` on its path.
One that runs tritonserver is the real Triton of the wheel, on the mounted repository with one thing exchanged: in the
slot ``tensorrt_llm`` works the CPU engine of the same checkpoint, with the manners of the C++ backend
(``cpp_backend.py``), and its loading is announced with the lines that TensorRT-LLM's runtime prints.

A100_DOUBLE names a folder: ``calls`` gets every command line; ``repository/`` is the CPU engine's rendered repository;
``runtime.json`` says what the runtime's log is to say; ``change.json``, where it is there, names a prompt, a place and
a token that is to come there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["A100_DOUBLE"])
os.environ["DOCKER_DOUBLE"] = str(FOLDER)  # which docker_serving reads when it is imported
#: The other doubles in this folder, from where this one is run as a program.
docker, docker_serving, cpp_backend = map(import_module, ("docker", "docker_serving", "cpp_backend"))
IMAGE = Path(__file__).parent / "image"
ENVIRONMENT = {"CUDA_VERSION": "13.1.0.036", "TRITON_SERVER_VERSION": "2.71.0"}


#: The container sees the repository at /models, and here it lies elsewhere: configs stay as they are rendered.
_ELSEWHERE = """

_initialize = TritonPythonModel.initialize


def _initialize_here(self, args):
    here = args["model_config"].replace('"/models/', '"{target}/')
    return _initialize(self, {{**args, "model_config": here}})


TritonPythonModel.initialize = _initialize_here
"""


def main() -> int:
    words = sys.argv[1:]
    with open(FOLDER / "calls", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[0] == "version":
        print("28.0.1")
    elif words[0] == "info":
        print('{"nvidia":{},"runc":{}}')
    elif words[0] == "kill":
        return kill(words[1])
    elif "tritonserver" in words:
        return serve(docker_serving.parser().parse_args(words[1:]))
    else:
        os.environ |= ENVIRONMENT | {"PYTHONPATH": str(IMAGE)}
        return int(docker.main())
    return 0


def kill(name: str) -> int:
    try:
        os.killpg(int((FOLDER / f"{name}.pid").read_text()), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return 1
    return 0


def serve(args: Any) -> int:
    """Triton as a child of the docker client, which hands signals on and returns its exit code."""
    from minitron_triton.server import bundled

    mounted = Path(next(volume for volume in args.volume if ":/models" in volume).split(":")[0])
    ports = {inside: outside for _, outside, inside in (port.split(":") for port in args.publish)}
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        repository = exchanged(mounted, Path(scratch) / "models")
        announce()
        bundled.prepare(Path(scratch))
        argv = [str(bundled.find().server), *(translated(word, repository, ports) for word in args.command[1:])]
        argv += [
            f"--backend-directory={scratch}/backends",
            "--pinned-memory-pool-byte-size=0",
            "--allow-gpu-metrics=false",
        ]
        environment = bundled.environment(Path(scratch), os.environ["MINITRON_SERVER"])
        environment["MINITRON_GRPC"] = f"127.0.0.1:{ports['8001']}"
        server = subprocess.Popen(argv, env=environment, start_new_session=True)
        (FOLDER / f"{args.name}.pid").write_text(str(server.pid))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: server.send_signal(number))
        code = server.wait()
    return code if code >= 0 else 128 - code


def translated(word: str, repository: Path, ports: dict[str, str]) -> str:
    """A flag of the container as it is outside: its ports, its addresses and its repository."""
    name, _, value = word.partition("=")
    if name.endswith("-port"):
        return f"{name}={ports[value]}"
    if value == "0.0.0.0":
        return f"{name}=127.0.0.1"
    return f"{name}={repository}" if name == "--model-repository" else word


def exchanged(mounted: Path, target: Path) -> Path:
    """The mounted repository with the CPU engine in the slot."""
    ours = FOLDER / "repository"
    shutil.copytree(mounted, target, symlinks=True, ignore=shutil.ignore_patterns("engine"))
    shutil.copytree(ours / "engine", target / "engine")
    shutil.rmtree(target / "tensorrt_llm" / "1")
    shutil.copytree(ours / "tensorrt_llm" / "1", target / "tensorrt_llm" / "1")
    for config in target.glob("*/config.pbtxt"):
        text = config.read_text().replace('"tensorrtllm"', '"python"')
        config.write_text(text)
    for model in target.glob("*/1/model.py"):
        if "def initialize" in (code := model.read_text(encoding="utf-8")):
            model.write_text(code + _ELSEWHERE.format(target=str(target)), encoding="utf-8")
    cpp_backend.make_alike(target / "tensorrt_llm" / "1", FOLDER / "change.json")
    return target


def announce() -> None:
    """What TensorRT-LLM prints while it loads an engine, with the numbers of runtime.json."""
    says = json.loads((FOLDER / "runtime.json").read_text())
    begin = "[TensorRT-LLM][INFO]"
    for name, value in says["limits"].items():
        print(f"{begin} TRTGptModel {name}: {value}")
    if "maxSequenceLen" in says["limits"]:
        longest = says["limits"]["maxSequenceLen"] - 1
        print(f"{begin} TRTGptModel maxInputLen: {longest}  = maxSequenceLen - 1 since chunked context is enabled")
    print(f"{begin} Capacity Scheduler Policy: GUARANTEED_NO_EVICT")
    print("[TensorRT-LLM][WARNING] gpu_device_ids is not specified, will be automatically set")
    for warning in says.get("warnings", ()):
        print(f"[TensorRT-LLM][WARNING] {warning}")
    print(f"{begin} Loaded engine size: {says['engine_mib']} MiB")
    print(f"{begin} [MemUsageChange] Allocated {says['context_mib']:.2f} MiB for execution context memory.")
    print(f"{begin} [MemUsageChange] Allocated 296.40 MB GPU memory for runtime buffers.")
    cache = f"Allocated {says['kv_gib']:.2f} GiB for max tokens in paged KV cache ({says['kv_tokens']})."
    print(f"{begin} [MemUsageChange] {cache}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
