"""Values of the Helm chart (``deploy/helm/minitron``) that follow from recipe, plan and repository.

The chart says how pods are shaped; what has to fit an engine (its folder in the store, the server's flags, memory,
/dev/shm, GPUs, how far to scale and by what) is derived here, so that it is typed nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minitron import data_files, files
from minitron.artifacts.manifest import Manifest
from minitron.errors import EngineError
from minitron.machine import compat
from minitron.model.runtime_limits import whole_blocks
from minitron.recipe_model import Percentiles, Recipe
from minitron.version import VERSION
from minitron_triton.server import container
from minitron_triton.server import flags as server_flags
from minitron_triton.server.launch import Options, Served

_MIB = 1 << 20
#: *Estimates*, bytes of host memory: tritonserver with its Python models; a CUDA context with pinned pools, for a rank.
_TRITON_BYTES = 2 << 30
_RANK_BYTES = 2 << 30
#: What is asked for a CPU server over what is predicted, which was within a tenth of what was measured.
_CPU_ROOM = 1.1
#: One worker of the gateway with its tokenizer, as `make bench-front` saw it, doubled.
_WORKER_BYTES = 512 << 20
_WORKERS_A_POD = 4
#: Flags that the chart decides by TLS, or that are different for every start.
_OF_THE_CHART = ("--http-address=",)
#: Share of what a full batch holds in the KV cache at which another replica is wanted.
_BUSY = 0.8


def values(
    recipe: Recipe, plan: Mapping[str, Any], served: Served, *, key: str, replicas: int | None = None
) -> dict[str, Any]:
    """What the chart is given for an engine that was planned as ``plan`` (a document of EnginePlan).

    ``key``: the engine's digest. ``replicas``: servers at the least; None: as many as hold the recipe's concurrency.
    """
    is_cpu = plan["gpu"] is None
    limits, wanted = plan["limits"], recipe.workload.concurrency
    least = replicas or math.ceil(wanted / limits["max_batch_size"])
    found: dict[str, Any] = {
        "engine": {
            "target": plan["target"],
            "key": key,
            "path": str(served.root) if served.root != served.folder else f"/store/{key[:12]}/repository",
            "ranks": [] if is_cpu else _ranks(served, recipe.serving.exit_timeout_s),
            "adminInterfaces": list(server_flags.ADMIN),
            "userInterfaces": list(server_flags.USER),
            "maxSeqLen": limits["max_seq_len"],
            "maxBatchSize": limits["max_batch_size"],
        },
        "recipe": yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False),
        "model": {"source": recipe.model.source},
        "images": {"toolkit": {"tag": VERSION}, "builder": {"tag": f"{VERSION}-gpu"}},
        "store": {"claim": {"size": _quantity(3 * _weights(plan) + (10 << 30))}},
        "triton": _triton(recipe, plan, served, least),
        "gateway": _gateway(recipe, plan, least),
        "autoscaling": {
            "minReplicas": least,
            "maxReplicas": 4 * least,
            "waitingPerReplica": max(1, limits["max_batch_size"] // 4),
            "kvCacheFraction": _busy_fraction(recipe, plan),
        },
    }
    found["build"] = {"resources": _memory(2 * _weights(plan) + (4 << 30), cpu=2)}
    if not is_cpu:
        image = recipe.container.image or served.image or compat.image(recipe.container.image_tag).reference
        repository, _, tag = image.rpartition(":")
        found["images"]["triton"] = {"repository": repository, "tag": tag}
        found["triton"]["env"] = dict(recipe.container.environment)
    if plan["roofline"]:
        found["monitoring"] = {"rooflineTokensPerSecond": int(plan["roofline"]["planned_tokens_per_s"])}
    return found


def write(recipe: Recipe, engine: Manifest, served: Served, output: Path, *, replicas: int | None = None,
          force: bool = False) -> Path:  # fmt: skip
    """Write ``output``/values.yaml for a rendered repository and the engine in it; raises EngineError, OutputError."""
    try:
        plan, key = engine.details["plan"], engine.details["cache"]["digest"]
        found = values(recipe, plan, served, key=key, replicas=replicas)
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"the engine's manifest does not tell {error}: build it again with this version of 'minitron build'"
        ) from error
    with files.new_folder(output, force=force) as folder:
        (folder / "values.yaml").write_text(text(found), encoding="utf-8")
    return output / "values.yaml"


def text(found: Mapping[str, Any]) -> str:
    """The values as YAML."""
    head = "# By 'minitron render --kubernetes', from recipe and plan; your own changes go into another file.\n"
    return head + yaml.safe_dump(dict(found), sort_keys=False, width=120)


def _ranks(served: Served, exit_timeout_s: int) -> list[list[str]]:
    """tritonserver's flags for each rank, as ``minitron serve`` gives them in the container, without keys."""
    options = Options(exit_timeout_s=exit_timeout_s, server_key="", host="0.0.0.0")
    words = container.command(served, options, "pod")
    blocks: list[list[str]] = []
    for word in words:
        if word == "tritonserver":
            blocks.append([])
        elif blocks and word.startswith("--") and not word.startswith(_OF_THE_CHART):
            blocks[-1].append(word)
    return blocks


def _triton(recipe: Recipe, plan: Mapping[str, Any], served: Served, replicas: int) -> dict[str, Any]:
    memory, limits, gateway = plan["memory"], plan["limits"], plan["gateway"]
    found: dict[str, Any] = {"replicas": replicas, "exitTimeoutSeconds": recipe.serving.exit_timeout_s}
    if plan["gpu"] is None:
        shm = 256 * _MIB
        cache = limits["max_batch_size"] * whole_blocks(limits["max_seq_len"]) * memory["kv_bytes_per_token"]
        # The engine gives its cache half of what the rest leaves (cpu_memory.Sizes): there is to be twice as much.
        needed = memory["weight_bytes"] + memory["activation_bytes"] + memory["runtime_bytes"] + 2 * cache
        needed = math.ceil(_CPU_ROOM * max(needed, memory["peak"]["loading"]))
        found |= {"gpu": {"count": 0}, "readyTimeoutSeconds": 600}
    else:
        shm = served.shm_bytes
        needed = _weights(plan) + plan["logits_bytes"] + _TRITON_BYTES + served.world_size * _RANK_BYTES
        found |= {"gpu": _gpu(plan, served.world_size), "readyTimeoutSeconds": 900}
    cpu = 2
    if gateway:  # Triton's own part of what gateway and Triton take together
        cpu = max(
            2, math.ceil(gateway["cores"] - plan["roofline"]["planned_tokens_per_s"] / gateway["worker_tokens_per_s"])
        )
    return found | {"shmBytes": shm, "resources": _memory(needed + shm, cpu=cpu + served.world_size - 1)}


def _gpu(plan: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Resource, count and node label of the GPUs; a slice of MIG is a resource of its own (device plugin, mixed)."""
    target = str(plan["target"])
    board, products = next(
        (board, found) for board, found in data_files.load("kubernetes.yaml")["gpu_products"].items()
        if target == board or (target.startswith(f"{board}-") and target[len(board) + 1].isdigit())
    )  # fmt: skip
    profile = target[len(board) + 1 :]
    resource = f"nvidia.com/mig-{profile}" if profile else "nvidia.com/gpu"
    return {"resource": resource, "count": world_size, "products": products}


def _gateway(recipe: Recipe, plan: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    workers = replicas * (plan["gateway"]["workers"] if plan["gateway"] else 1)
    pods = math.ceil(workers / _WORKERS_A_POD)
    each = math.ceil(workers / pods)
    streams = replicas * (plan["limits"]["max_batch_size"] + (recipe.serving.max_queue_size or 1024))
    return {
        "replicas": pods, "workers": each, "maxStreams": math.ceil(streams / pods),
        "drainSeconds": recipe.serving.exit_timeout_s,
        "resources": _memory(each * _WORKER_BYTES + (256 << 20), cpu=each),
    }  # fmt: skip


def _busy_fraction(recipe: Recipe, plan: Mapping[str, Any]) -> float:
    """The KV cache in use at which a server is busy: a share of what a full batch of median sequences holds.

    A GPU's cache is sized by the plan; a CPU engine's holds a full batch of the longest, and sets a sequence's blocks
    aside from its start to its end.
    """
    limits, memory = plan["limits"], plan["memory"]
    prompt, output = _median(recipe.workload.input_tokens, 512), _median(recipe.workload.output_tokens, 256)
    batch = limits["max_batch_size"]
    if plan["gpu"] is None:
        held, pool = prompt + output, batch * whole_blocks(limits["max_seq_len"])
    else:
        held = prompt + output // 2
        pool = int(memory["free_bytes"] * plan["kv_cache_free_gpu_mem_fraction"]) // memory["kv_bytes_per_token"]
    return float(round(max(0.05, min(0.9, _BUSY * batch * whole_blocks(held) / pool)), 2))


def _median(tokens: int | Percentiles | None, otherwise: int) -> int:
    return otherwise if tokens is None else tokens if isinstance(tokens, int) else tokens.p50


def _weights(plan: Mapping[str, Any]) -> int:
    return int(plan["weights"][plan["precision"]]["total"])


def _memory(needed: int, *, cpu: int) -> dict[str, Any]:
    """Memory is asked for as it is limited: a server that is squeezed later dies in the middle of its streams."""
    size = _quantity(needed)
    return {"requests": {"cpu": str(cpu), "memory": size}, "limits": {"memory": size}}


def _quantity(size: int) -> str:
    return f"{math.ceil(size / (256 * _MIB)) * 256}Mi"
