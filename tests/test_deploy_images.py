"""The images' command, and the compose file in step with the chart and the commands that it runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart import CHART
from conftest import ROOT, minitron

COMPOSE = ROOT / "deploy" / "compose"


def compose() -> dict[str, Any]:
    found = yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("target", ["serve", "builder"])
def test_the_image_s_command_names_a_stage_and_every_argument(target: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "image.py", target, "--print"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"^FROM .* AS {target}$", dockerfile, re.MULTILINE) and f"--target={target}" in done.stdout
    assert set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE)) == set(
        re.findall(r"--build-arg=(\w+)=", done.stdout)
    )


def test_images_are_not_root_and_start_from_data() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for stage in ("serve", "builder"):
        (body,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
        assert "USER 1000:1000" in body
    assert all(
        name.startswith("${") or name in ("wheel", "packages")
        for name in re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    )


def test_compose_mounts_what_is_there() -> None:
    for service in compose().values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (COMPOSE / source).is_file(), source
    assert all(port.startswith("127.0.0.1:") for one in compose().values() for port in one.get("ports", []))


def test_compose_names_no_collector_by_itself() -> None:
    """An empty variable is one that is not set, by OpenTelemetry's specification."""
    services = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())["services"]
    expected = {"OTEL_EXPORTER_OTLP_ENDPOINT": "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"}
    assert services["triton"]["environment"] == services["gateway"]["environment"] == expected


def test_compose_gives_flags_that_the_commands_have(small_repository: Any, tmp_path: Path) -> None:
    words = compose()["triton"]["command"]
    own = [str(small_repository("int8_weight_only")) if word == "/models" else word for word in words]
    assert "tritonserver" in minitron(*own, "--dry-run").stdout
    # It stops at the repository, which is not there, so every flag before it was taken.
    own = [word.replace("/models", str(tmp_path / "none")) for word in compose()["gateway"]["command"]]
    done = minitron(*own, check=False)
    assert done.returncode == 3 and "tensorrt_llm_bls" in done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    shutil.copy(COMPOSE / "prometheus.yaml", tmp_path)
    shutil.copy(CHART / "files" / "rules.yaml", tmp_path)
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
