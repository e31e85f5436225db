"""The engine cache: every ingredient counts, and only a complete engine of the same digest is a hit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import minitron
from minitron import recipe
from minitron.artifacts import manifest
from minitron.errors import OutputExists
from minitron.version import VERSION
from minitron_build.engines import cache
from minitron_build.engines.cache import EngineKey
from minitron_build.plan import engine_plan, model

WANTED = recipe.load("a100-int8", {}).recipe
PLAN = engine_plan.plan(WANTED, model.look_up(WANTED.model)).identity()
KEY = EngineKey("5" * 64, "int8_weight_only", "bfloat16", PLAN, "tensorrt-llm 1.2.1", "sm80")


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values in nested dictionaries."""
    if isinstance(value, Mapping) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [path]


def with_other(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(document))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = "other"
    return copy


@pytest.mark.parametrize("name", ["source", "precision", "dtype", "runtime", "architecture"])
def test_every_ingredient_changes_the_digest(name: str) -> None:
    changes: dict[str, Any] = {name: "other"}
    assert replace(KEY, **changes).digest != KEY.digest


@pytest.mark.parametrize("path", leaves(PLAN), ids=".".join)
def test_every_value_of_the_plan_changes_the_digest(path: tuple[str, ...]) -> None:
    assert replace(KEY, plan=with_other(PLAN, path)).digest != KEY.digest


@pytest.mark.parametrize(
    "flags",
    [
        {"target": "a100-40gb"}, {"precision": "int4_weight_only"}, {"dtype": "float16"}, {"tensor_parallel": 2},
        {"pipeline_parallel": 2}, {"workload.concurrency": 31}, {"workload.input_tokens": 1000},
        {"workload.output_tokens": 1000}, {"limits.max_batch_size": 31}, {"limits.max_num_tokens": 4096},
        {"limits.max_seq_len": 1500}, {"limits.max_input_len": 1000}, {"memory.kv_cache_fraction": 0.5},
        {"memory.activation_margin": 0.5}, {"memory.runtime_bytes": 0},
    ],
    ids=lambda flags: next(iter(flags)),
)  # fmt: skip
def test_what_a_recipe_decides_is_in_the_plan(flags: dict[str, Any]) -> None:
    other = recipe.load("a100-int8", {}, flags).recipe
    assert engine_plan.plan(other, model.look_up(other.model)).identity() != PLAN


def test_equal_ingredients_have_equal_digests_in_any_order() -> None:
    turned = dict(reversed(list(PLAN.items())))
    assert replace(KEY, plan=turned).digest == KEY.digest
    assert cache.default_output("minitron", KEY) == Path("out", "engines", f"minitron-{KEY.digest[:12]}")


def test_where_the_model_lies_does_not_matter() -> None:
    planned = model.look_up(WANTED.model)
    moved = replace(planned, source="/elsewhere", shape_from="/elsewhere/config.json")
    assert engine_plan.plan(WANTED, moved).identity() == PLAN


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder that looks like an engine of KEY."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "rank0.engine").write_bytes(b"an engine")
    source = manifest.Input("checkpoint", str(tmp_path), "5" * 64)
    manifest.write(folder, "engine", source, arguments={}, details={"cache": KEY.record()})
    return folder


def test_a_complete_engine_of_the_same_digest_is_a_hit(engine: Path) -> None:
    assert cache.find(engine, KEY) == manifest.read(engine, "engine")


def test_an_engine_of_another_digest_is_none(engine: Path) -> None:
    assert cache.find(engine, replace(KEY, architecture="sm90")) is None


@pytest.mark.parametrize("fault", ["missing", "shorter", "touched", "no manifest", "only engine files"])
def test_an_engine_that_is_not_in_its_place_is_none(engine: Path, fault: str) -> None:
    file = engine / "rank0.engine"
    if fault == "missing":
        file.unlink()
    elif fault == "shorter":
        file.write_bytes(b"an")
    elif fault == "touched":
        os.utime(file, ns=(1, 1))
    elif fault == "no manifest":
        (engine / manifest.NAME).unlink()
    else:
        (engine / manifest.NAME).write_text("{}")
    assert cache.find(engine, KEY) is None
    with pytest.raises(OutputExists):
        cache.check_free(engine, force=False)
    cache.check_free(engine, force=True)


def test_an_engine_of_another_version_counts_where_trtllm_build_made_it(engine: Path) -> None:
    path = engine / manifest.NAME
    path.write_text(path.read_text().replace(f'"toolkit": "{VERSION}"', '"toolkit": "0.0.9"'))
    assert cache.find(engine, KEY) is not None
    on_cpu = replace(KEY, architecture="cpu")
    path.write_text(path.read_text().replace(KEY.digest, on_cpu.digest))
    assert cache.find(engine, on_cpu) is None


def test_the_cpu_target_uses_the_same_cache(small_checkpoint: Any, tmp_path: Path) -> None:
    words = ("build", small_checkpoint("int4_weight_only"), "--recipe", "cpu", "--precision", "int4_weight_only",
             "--output", tmp_path / "engine", "--json")  # fmt: skip
    first, second = (json.loads(minitron(*words).stdout) for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["digest"] == second["digest"]
    assert first["limits"] == {"max_batch_size": 4, "max_input_len": 512, "max_seq_len": 768, "max_num_tokens": 256}
    done = minitron(*words, "--execution", "fast", check=False)
    assert done.returncode == OutputExists.exit_code
