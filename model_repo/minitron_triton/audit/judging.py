"""The lines of step ``audit``: parameters as meant, and the plan's estimates against what the runtime took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import web
from minitron.artifacts import manifest
from minitron.checks import SKIPPED, Check, judge
from minitron.console import human_bytes
from minitron.errors import NotReady
from minitron.model.runtime_limits import longest_prompt, whole_blocks
from minitron.prometheus import Metrics
from minitron_triton.audit.runtime_log import RuntimeLog
from minitron_triton.repository import config_text, parameters
from minitron_triton.server.launch import Served
from minitron_triton.server.state import State

MODEL = "tensorrt_llm"
#: By how much the engine's size may differ from the weights: plans and tables come on top, equal tensors are shared.
WEIGHTS_TOLERANCE, WEIGHTS_EXTRA_BYTES = 0.05, 64 << 20
#: By how much workspace and buffers may exceed the plan's estimate, which has its margin already.
WORKSPACE_TOLERANCE = 0.25
#: How many of the promised KV tokens may be missing.
KV_TOLERANCE = 0.1
_BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
_TIMEOUT_S = 10.0
#: The runtime's name of a limit → the engine's.
_LIMITS = {"maxBatchSize": "max_batch_size", "maxSequenceLen": "max_seq_len", "maxNumTokens": "max_num_tokens"}
_NO_GPU = "a CPU engine is mapped from its file: there is no GPU memory to plan"
_NOT_SAID = "the server's log does not say"


@dataclass(frozen=True)
class InspectedServer:
    """A server with all that is known of it beforehand; ``details`` and ``plan`` are those of the engine's manifest."""

    config: Any
    served_config: Mapping[str, Any]
    log: RuntimeLog
    metrics: Metrics
    details: Mapping[str, Any]

    @property
    def planned_memory(self) -> Mapping[str, Any] | None:
        """The plan's bytes on the fullest GPU; None for a CPU engine, which takes memory as it comes."""
        if self.config.backend != "tensorrtllm":
            return None
        planned: Mapping[str, Any] = self.details["plan"]["memory"]
        return planned

    def numbers(self) -> dict[str, int]:
        """What the runtime said in figures, in bytes and tokens; what it did not say is absent."""
        said: dict[str, int | None] = {
            "engine_bytes": self.log.engine_bytes,
            "kv_cache_bytes": self.log.kv_cache_bytes,
            "kv_cache_tokens": _kv_tokens_found(self),
            "kv_cache_tokens_promised": _kv_tokens_promised(self),
            **{f"{name.replace(' ', '_')}_bytes": size for name, size in self.log.workspace_bytes.items()},
            **self.log.limits,
        }
        return {name: value for name, value in said.items() if value is not None}


def inspect_server(repository: Path, state: State) -> InspectedServer:
    """Ask the server, and read its log and what it was made from; raises NotReady, InputError, RepositoryError."""
    served = Served.read(repository)
    where = served.folder / MODEL / "config.pbtxt"
    return InspectedServer(
        config=config_text.parse(where.read_text(encoding="utf-8"), str(where)),
        served_config=_served_config(state.urls["http"]),
        log=RuntimeLog.parse(state.log.read_text(encoding="utf-8", errors="replace").splitlines()),
        metrics=Metrics.read(state.urls["metrics"]),
        details=manifest.read(served.engine, "engine").details,
    )


def _served_config(url: str) -> Mapping[str, Any]:
    page = web.read(url, f"/v2/models/{MODEL}/config", f"the config of {MODEL}", "is the server up?", _TIMEOUT_S)
    try:
        loaded: Mapping[str, Any] = json.loads(page)
        return loaded
    except ValueError as error:
        raise NotReady(f"{url}: the config of {MODEL} is no JSON ({error}); is the server up?") from error


def judge_all(running: InspectedServer) -> list[Check]:
    """All lines of the step."""
    return [_parameters(running), _weights(running), _workspace(running), _kv_tokens(running)]


def _parameters(running: InspectedServer) -> Check:
    meant = {key: value.string_value for key, value in running.config.parameters.items()}
    problems = [*_config_problems(running, meant), *_log_problems(running, meant)]
    shown = f"{len(meant)} parameters, limits and policy as rendered"
    said = ", ".join(f"{name} {value}" for name, value in running.log.limits.items())
    if not problems and not said and running.config.backend == "tensorrtllm":
        reason = (
            "not one line 'TRTGptModel ...' of the runtime was recognised in the server's log, so its warnings may "
        )
        return Check("audit.parameters", SKIPPED, reason + "have been missed too; the served config is as rendered")
    return judge("audit.parameters", problems, f"{shown}; the runtime says {said}" if said else shown)


def _config_problems(running: InspectedServer, meant: Mapping[str, str]) -> Iterator[str]:
    served = running.served_config
    has = {key: value["string_value"] for key, value in served.get("parameters", {}).items()}
    for key in meant.keys() | has.keys():
        if meant.get(key) != has.get(key):
            yield f"{key} is {has.get(key)!r} in the server, and {meant.get(key)!r} was rendered"
    config = running.config
    pairs = {
        "max_batch_size": (served.get("max_batch_size", 0), config.max_batch_size),
        "decoupled": (served.get("model_transaction_policy", {}).get("decoupled", False),
                      config.model_transaction_policy.decoupled),
        "max_queue_size": (
            served.get("dynamic_batching", {}).get("default_queue_policy", {}).get("max_queue_size", 0),
            config.dynamic_batching.default_queue_policy.max_queue_size),
    }  # fmt: skip
    for key, (found, wanted) in pairs.items():
        if found != wanted:
            yield f"{key} is {found!r} in the server, and {wanted!r} was rendered"


def _log_problems(running: InspectedServer, meant: Mapping[str, str]) -> Iterator[str]:
    """What the runtime says that it did not read, or read as something else."""
    for key, text in running.log.not_read.items():
        if meant.get(key):
            yield f"{key} was rendered as {meant[key]!r}, and the backend says: {text}"
    limits = running.details["limits"]
    for name, own in _LIMITS.items():
        found = running.log.limits.get(name)
        if found is not None and found != limits[own]:
            yield f"{own} is {found} in the runtime, and {limits[own]} in the plan"
    chunked = parameters.is_true(meant.get("enable_chunked_context"))
    prompt = longest_prompt(limits["max_seq_len"], limits["max_num_tokens"], chunked_context=chunked)
    if running.log.limits.get("maxInputLen", prompt) != prompt:
        yield f"a prompt may have {running.log.limits['maxInputLen']} tokens in the runtime, and {prompt} were expected"
    beams, wanted = running.log.limits.get("maxBeamWidth"), meant.get("max_beam_width")
    if beams is not None and wanted is not None and beams != int(wanted):
        yield f"max_beam_width is {beams} in the runtime, and {wanted} was rendered"
    policy, asked = running.log.scheduler_policy, meant.get("batch_scheduler_policy", "")
    if policy is not None and policy.lower() != asked.lower():
        yield f"batch_scheduler_policy is {policy} in the runtime, and {asked} was rendered"


def _weights(running: InspectedServer) -> Check:
    name = "audit.weights"
    found, memory = running.log.engine_bytes, running.planned_memory
    if memory is None or found is None:
        return Check(name, SKIPPED, _NOT_SAID if memory else _NO_GPU)
    planned = int(memory["weight_bytes"])
    room = WEIGHTS_TOLERANCE * planned + WEIGHTS_EXTRA_BYTES
    shown = f"engine {human_bytes(found)}, weights by the plan {human_bytes(planned)}"
    return judge(name, [f"{shown}: more than {room / planned:.0%} apart"] if abs(found - planned) > room else [], shown)


def _workspace(running: InspectedServer) -> Check:
    name = "audit.workspace"
    parts, memory = running.log.workspace_bytes, running.planned_memory
    if memory is None or not parts:
        return Check(name, SKIPPED, _NOT_SAID if memory else _NO_GPU)
    found, planned = sum(parts.values()), memory["activation_bytes"] + memory["runtime_bytes"]
    shown = ", ".join(f"{what} {human_bytes(size)}" for what, size in parts.items())
    shown += f": {human_bytes(found)}, estimated {human_bytes(planned)}"
    over = found > planned * (1 + WORKSPACE_TOLERANCE)
    return judge(name, [f"{shown}: more than {WORKSPACE_TOLERANCE:.0%} above"] if over else [], shown)


def _kv_tokens(running: InspectedServer) -> Check:
    found, promised = _kv_tokens_found(running), _kv_tokens_promised(running)
    if found is None:
        return Check("audit.kv_tokens", SKIPPED, "neither the log nor the metrics say")
    shown = f"{found:,} tokens, {promised:,} promised"
    low = found < promised * (1 - KV_TOLERANCE)
    return judge("audit.kv_tokens", [f"{shown}: more than {KV_TOLERANCE:.0%} below"] if low else [], shown)


def _kv_tokens_found(running: InspectedServer) -> int | None:
    if running.log.kv_cache_tokens is not None:
        return running.log.kv_cache_tokens
    blocks = running.metrics.sum(_BLOCKS, kv_cache_block_type="max")
    each = running.metrics.sum(_BLOCKS, kv_cache_block_type="tokens_per")
    return int(blocks * each) if blocks and each else None


def _kv_tokens_promised(running: InspectedServer) -> int:
    """On a GPU the planned fraction of what the plan leaves free; on a CPU a full batch of longest sequences."""
    parameter = running.config.parameters["max_tokens_in_paged_kv_cache"].string_value
    memory = running.planned_memory
    if memory is None:
        limits = running.details["limits"]
        tokens = limits["max_batch_size"] * whole_blocks(limits["max_seq_len"])
    else:
        fraction = float(running.config.parameters["kv_cache_free_gpu_mem_fraction"].string_value)
        tokens = int(memory["free_bytes"] * fraction) // int(memory["kv_bytes_per_token"])
    return int(min(tokens, int(parameter)) if parameter else tokens)
