"""The command line of trtllm-build, from one data file, and the arguments that a plan becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from minitron import documents
from minitron.errors import UsageError
from minitron_build.plan.engine_plan import EnginePlan

PROGRAM = "trtllm-build"
DATA = "trtllm_build.yaml"
Value = bool | int | str


@dataclass(frozen=True)
class Flag:
    """One flag of trtllm-build 1.2; see the head of trtllm_build.yaml for the meaning of the fields."""

    name: str
    type: str
    default: Value | None
    use: str
    choices: tuple[str, ...] = ()
    min: int | None = None
    alias: str | None = None
    build_config: str | None = None
    plugin: bool = False

    def check(self, value: Value) -> None:
        """Raise UsageError where trtllm-build would not take ``value``, or it would make no sense."""
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "switch": isinstance(value, bool),
            "text": isinstance(value, str),
        }.get(self.type, value in self.choices)
        if not fits:
            kinds = {"int": "a whole number", "switch": "true or false", "text": "a text"}
            raise UsageError(
                f"--{self.name} of {PROGRAM} takes {kinds.get(self.type, ', '.join(self.choices))}, not {value!r}"
            )
        if self.min is not None and isinstance(value, int) and value < self.min:
            raise UsageError(f"--{self.name} of {PROGRAM} is {value}, and {self.min} is the least that makes sense")

    def in_config(self, value: Value) -> Any:
        """What the engine's config.json says after ``value`` was asked for (TensorRT-LLM builder.py, 1.x)."""
        if self.plugin:
            return {"enable": True, "disable": False if self.type == "onoff" else None}.get(str(value), value)
        return str(value).upper() if self.name == "kv_cache_type" else value


@cache
def flags() -> dict[str, Flag]:
    """Every flag by its name."""
    text = (resources.files("minitron_build.engines.tensorrt") / DATA).read_text(encoding="utf-8")
    data = documents.mapping(text, DATA)
    found = {}
    for section, plugin in (("flags", False), ("plugins", True)):
        for name, entry in data[section].items():
            extra = entry.pop("also", [])
            if entry["type"] == "dtype":
                entry["choices"] = [*data["dtypes"], *extra]
            elif entry["type"] == "onoff":
                entry["choices"] = ["enable", "disable"]
            entry["choices"] = tuple(entry.get("choices", ()))
            found[name] = Flag(name=name, plugin=plugin, **entry)
    return found


def arguments(
    plan: EnginePlan,
    checkpoint: Path | str,
    output: Path | str,
    *,
    output_timing_cache: Path | str,
    input_timing_cache: Path | str | None = None,
    workers: int | None = None,
    more: Mapping[str, Value] | None = None,
) -> dict[str, Value]:
    """The flags that a plan becomes, by name, in the order in which they are given.

    The paths are those that trtllm-build will see. ``workers``: ranks that are built side by side (default: all).
    ``more``: flags of the recipe's trtllm_build. Raises UsageError for a flag that may not be set, or a wrong value.
    """
    limits = plan.limits
    chosen: dict[str, Value] = {
        "checkpoint_dir": str(checkpoint),
        "output_dir": str(output),
        # Off by default, and then TensorRT's own GEMMs serve what is not quantised; NVIDIA builds Nemotron with auto.
        "gemm_plugin": "auto",
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        # In-flight batching with a cache in blocks; said here although it is the default, since all the rest needs it.
        "kv_cache_type": "paged",
        # Lets prompts be prefilled in pieces and equal beginnings be shared.
        "use_paged_context_fmha": "enable",
        # The default is a file in the current directory.
        "output_timing_cache": str(output_timing_cache),
    }
    if plan.logits_bytes:
        # Deprecated in favour of the executor's config, which the Triton backend does not set: without the flag the
        # executor refuses every request for them (executorImpl.cpp, trtGptModelInflightBatching.h,
        # model_instance_state.cc 0c8de69a). Whether it still counts, the engine's config.json says.
        chosen["gather_generation_logits"] = True
    if input_timing_cache is not None:
        chosen["input_timing_cache"] = str(input_timing_cache)
    if plan.parallel.world_size > 1:
        chosen["workers"] = workers or plan.parallel.world_size
    for name, value in (more or {}).items():
        chosen[name] = _of_recipe(name, value)
    for name, value in chosen.items():
        flags()[name].check(value)
    return chosen


def _of_recipe(name: str, value: Value) -> Value:
    flag = flags().get(name)
    if flag is None:
        raise UsageError(f"trtllm_build.{name}: {PROGRAM} 1.2 has no flag --{name}")
    if flag.use == "plan":
        raise UsageError(f"trtllm_build.{name}: the plan sets --{name}; use the recipe's workload or limits")
    if flag.use != "recipe":
        raise UsageError(f"trtllm_build.{name}: --{name} is not to be set ({flag.use.partition(': ')[2]})")
    return value


def argv(chosen: Mapping[str, Value]) -> list[str]:
    """The command line; switches that are off are left out."""
    words = [PROGRAM]
    for name, value in chosen.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", str(value)]
    return words
