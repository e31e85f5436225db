"""The doubles of tools that cannot run here, against what is known of those tools: data/doubles.json, with its sources.

What holds the others is in doubles/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA, ROOT, SMALL_MODEL
from doubles import docker, tensorrt_llm, trtllm_build
from minitron.machine import compat
from minitron_build.checkpoint.convert import convert

FACTS = json.loads((DATA / "doubles.json").read_text())
DOUBLES = ROOT / "tests" / "doubles"


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A parser's options by name, those of help and of what follows them apart."""
    found = {action.option_strings[-1]: action for action in parser._actions if action.option_strings}
    found.pop("--help")
    return found


@pytest.fixture
def docker_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DOCKER_DOUBLE", str(tmp_path))
    return importlib.import_module("doubles.docker_serving")


def test_the_docker_doubles_know_options_of_docker_run_and_no_others(docker_serving: Any) -> None:
    facts = FACTS["docker"]
    for parser in (docker.parser(), docker_serving.parser()):
        known = options(parser)
        assert set(known) <= set(facts["run"])
        for name, action in known.items():
            assert isinstance(action, argparse._StoreTrueAction) == (facts["run"][name] == "bool"), name
            assert isinstance(action, argparse._AppendAction) == (name in facts["several"]), name
    assert set(options(docker.parser())) | set(options(docker_serving.parser())) == set(facts["run"])


@pytest.mark.parametrize("script", ["docker.py", "docker_serving.py"])
def test_a_docker_double_refuses_what_docker_would(tmp_path: Path, script: str) -> None:
    """An option that there is not, an image's name that is none, a folder that is not there, another command."""
    words = ["--rm", "--name=n", "--gpus=all", "--shm-size=1g", "--user=0:0",
             *(["--network=none", "--workdir=/"] if script == "docker.py" else ["--stop-timeout=1"])]  # fmt: skip

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"DOCKER_DOUBLE": str(tmp_path), "DOCKER_DOUBLE_LOG": ""}
        return subprocess.run([sys.executable, DOUBLES / script, *words], env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip

    for wrong, said in (
        (["run", *words, "--gpu=all", "nvcr.io/x/y:1", "true"], "--gpu"),
        (["run", *words, "not an image", "true"], "invalid reference format"),
        (["run", *words, f"--volume={tmp_path}/nowhere:/x", "nvcr.io/x/y:1", "true"], "no"),
        (["start", "n"], "command"),
    ):
        done = run(*wrong)
        assert done.returncode and said in done.stderr, (wrong, done.stderr)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config.json of an engine that the double of trtllm-build made, with every default."""
    folder = tmp_path_factory.mktemp("built")
    convert(SMALL_MODEL, folder / "checkpoint", precision="int8_weight_only")
    words = ["--checkpoint_dir", str(folder / "checkpoint"), "--output_dir", str(folder / "engine")]
    program = [sys.executable, str(DOUBLES / "trtllm_build.py"), *words]
    subprocess.run(program, cwd=folder, check=True, capture_output=True)
    return dict(json.loads((folder / "engine" / "config.json").read_text()))


def test_an_engine_of_the_trtllm_build_double_says_what_a_real_one_says(built: dict[str, Any]) -> None:
    facts = FACTS["trtllm_build"]
    assert list(built) == facts["engine_config"]
    assert set(built["build_config"]) == set(facts["build_config"])
    of_weight_only = {"weight_only_quant_matmul_plugin"}  # set by the build itself for W8A16 and W4A16
    assert set(built["build_config"]["plugin_config"]) == set(facts["plugin_config"]) | of_weight_only


def test_values_of_a_real_build_that_follow_from_its_defaults(built: dict[str, Any]) -> None:
    """Contract of trtllm-build: clipping by max_position_embeddings (the small Minitron's 2048), names, numbers."""
    build = built["build_config"]
    assert (build["max_batch_size"], build["max_beam_width"], build["max_seq_len"]) == (2048, 1, 2048)
    assert (build["max_input_len"], build["max_num_tokens"], build["opt_num_tokens"]) == (1024, 8192, 2048)
    assert (build["kv_cache_type"], build["speculative_decoding_mode"], build["strongly_typed"]) == ("PAGED", 1, True)
    plugins = build["plugin_config"]
    assert (plugins["gemm_plugin"], plugins["paged_kv_cache"], plugins["nccl_plugin"]) == (None, True, None)
    assert not (plugins["reduce_fusion"] or plugins["use_fp8_context_fmha"])


def test_the_image_double_has_the_versions_of_the_image_that_it_stands_for() -> None:
    """The contract's row of 26.07, which triton_tensors.json has and compat.yaml repeats."""
    rows = json.loads((DATA / "triton_tensors.json").read_text())["containers"]
    row = next(row for row in rows if row["tag"] == compat.image().tag)
    (metadata,) = (DOUBLES / "image").glob("tensorrt-*.dist-info/METADATA")
    assert f"Version: {row['tensorrt']}" in metadata.read_text()
    assert row["trtllm"] == trtllm_build.VERSION
    code = "import tensorrt_llm, torch; print(tensorrt_llm.__version__, torch.version.cuda)"
    said = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(DOUBLES / "image")}, check=True,
                          capture_output=True, text=True).stdout.split()  # fmt: skip
    assert said[0] == row["trtllm"] and row["cuda"].startswith(said[1])


def test_the_llm_api_double_knows_arguments_of_the_llm_api_and_no_others() -> None:
    facts = FACTS["llmapi"]
    assert set(facts["llm"]) >= tensorrt_llm.LLM_ARGUMENTS
    assert set(facts["kv_cache"]) >= tensorrt_llm.KV_CACHE_ARGUMENTS
    assert set(facts["sampling"]) >= tensorrt_llm.SAMPLING_ARGUMENTS


def test_every_double_is_in_the_table_with_a_test_that_holds_it() -> None:
    table = (DOUBLES / "README.md").read_text()
    for path in DOUBLES.iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            assert f"`{path.name}`" in table, path.name
    for test in re.findall(r"`(test_\w+\.py)`", table):
        assert (ROOT / "tests" / test).is_file(), test
