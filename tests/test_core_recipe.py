"""Recipes: layers, strictness, the place named in each error, those that ship. Expected values are written here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from conftest import minitron
from minitron import recipe
from minitron.errors import InputError, MinitronError, UsageError

NO_ENVIRONMENT: dict[str, str] = {}
SHIPPED = ["a100-bfloat16", "a100-float16", "a100-int4", "a100-int4-awq", "a100-int8", "a100-llmapi", "cpu"]


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flag_beats_environment_beats_recipe_beats_default(tmp_path: Path) -> None:
    mine = written(tmp_path, "precision: float16\nworkload: {concurrency: 3, input_tokens: 100}\n")
    environment = {"MINITRON_RECIPE_WORKLOAD_CONCURRENCY": "5", "MINITRON_RECIPE_PRECISION": "bfloat16"}
    effective = recipe.load(mine, environment, {"workload.concurrency": "7"})
    assert effective.recipe.workload.concurrency == 7
    assert effective.origins["workload.concurrency"] == "flag --concurrency"
    assert effective.recipe.precision == "bfloat16"
    assert effective.origins["precision"] == "environment MINITRON_RECIPE_PRECISION"
    assert effective.recipe.workload.input_tokens == 100
    assert effective.origins["workload.input_tokens"] == f"recipe {mine}"
    assert effective.recipe.workload.output_tokens is None
    assert effective.origins["workload.output_tokens"] == "default"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("precison: float16\n", "precison: there is no such key; did you mean precision?"),
        ("workload: {concurency: 4}\n", "workload.concurency: there is no such key; did you mean workload.concurrency"),
        ("precision: int3\n", "precision: "),
        ("workload: {concurrency: '8'}\n", "workload.concurrency: "),
        ("workload: {concurrency: 0}\n", "workload.concurrency: "),
        ("workload: {concurrency: true}\n", "workload.concurrency: "),
        ("workload: {input_tokens: {p50: 9, max: 5}}\n", "workload.input_tokens: "),
        ("workload: {input_tokens: {p50: 9, p95: 8, max: 10}}\n", "workload.input_tokens: "),
        ("workload: {output_tokens: 0}\n", "output_tokens is 0"),
        ("workload: 3\n", "workload: "),
        ("target: a100-80gb\nbackend: llmapi\nprecision: int8_weight_only\n", "needs a TensorRT engine"),
        ("precision: float16\ndtype: bfloat16\n", "dtype bfloat16 does not go with precision float16"),
        ("precision: float16\nprecision: bfloat16\n", "stands twice"),
        ("- a\n- b\n", "holds no mapping"),
        ("a: [\n", "is not valid YAML"),
        ("precision: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    mine = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        recipe.load(mine, NO_ENVIRONMENT)
    assert mine in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"MINITRON_RECIPE_PRECISON": "float16"}, "MINITRON_RECIPE_PRECISON names no field"),
        ({"MINITRON_RECIPE_WORKLOAD_CONCURRENCY": "many"}, "environment MINITRON_RECIPE_WORKLOAD_CONCURRENCY"),
    ],
)
def test_a_wrong_environment_variable_is_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        recipe.load(None, environment)


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(UsageError, match=r"flag --concurrency: workload\.concurrency"):
        recipe.load("cpu", NO_ENVIRONMENT, {"workload.concurrency": "-1"})


def test_a_recipe_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"a100-bfloat16, a100-float16"):
        recipe.load("a100-int3", NO_ENVIRONMENT)


def test_the_recipes_that_ship() -> None:
    assert recipe.shipped() == SHIPPED
    wanted = {
        "a100-float16": ("float16", "a100-80gb", "engine"),
        "a100-bfloat16": ("bfloat16", "a100-80gb", "engine"),
        "a100-int8": ("int8_weight_only", "a100-80gb", "engine"),
        "a100-int4": ("int4_weight_only", "a100-40gb", "engine"),
        "a100-int4-awq": ("int4_awq", "a100-40gb", "engine"),
        "a100-llmapi": ("bfloat16", "a100-80gb", "llmapi"),
        "cpu": ("int8_weight_only", "cpu", "engine"),
    }
    for name, (precision, target, backend) in wanted.items():
        shipped = recipe.load(name, NO_ENVIRONMENT).recipe
        assert (shipped.precision, shipped.target, shipped.backend) == (precision, target, backend)


def test_every_field_is_described_and_has_a_flag_of_its_own() -> None:
    paths = [path for path, _ in recipe.fields()]
    assert all(info.description for _, info in recipe.fields())
    for name in (recipe.flag_of, recipe.dest_of, recipe.environment_name):
        assert len({name(path) for path in paths}) == len(paths)


def test_a_command_takes_part_with_two_lines() -> None:
    parser = argparse.ArgumentParser()
    recipe.add_flags(parser, "precision", "tensor_parallel", "use_parallel_embedding")
    args = parser.parse_args(["--recipe", "a100-int8", "--tp", "2", "--use-parallel-embedding"])
    wanted = recipe.from_args(args, NO_ENVIRONMENT).recipe
    assert (wanted.precision, wanted.tensor_parallel, wanted.use_parallel_embedding) == ("int8_weight_only", 2, True)


def test_the_environment_may_name_the_recipe() -> None:
    parser = argparse.ArgumentParser()
    recipe.add_flags(parser, "precision")
    effective = recipe.from_args(parser.parse_args([]), {"MINITRON_RECIPE": "a100-int4"})
    assert effective.recipe.precision == "int4_weight_only"


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_show_prints_one_json_document(name: str) -> None:
    document = json.loads(minitron("plan", "--show-recipe", "--recipe", name, "--json").stdout)
    assert set(document) == {"recipe", "values", "origins"}
    assert document["origins"]["target"] == f"recipe {name}"
    assert document["origins"]["serving.grpc_port"] == "default"


def test_recipe_show_names_the_place_of_a_mistake(tmp_path: Path) -> None:
    done = minitron("plan", "--show-recipe", "--recipe", written(tmp_path, "targe: cpu\n"), check=False)
    assert done.returncode == InputError.exit_code
    assert "targe: there is no such key; did you mean target?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_errors_are_of_the_tree() -> None:
    assert issubclass(UsageError, MinitronError)
