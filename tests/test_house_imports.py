"""What may be imported where, beyond the contracts in pyproject.toml that import-linter holds (``make check``)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import minitron_client
from conftest import ROOMS, ROOT
from minitron_client import client

#: Inside Triton these stand alone in a version folder: they import what lies beside them there, and the text code.
SELF_CONTAINED = ROOT / "model_repo" / "minitron_triton" / "models"
TEXT = ROOT / "core" / "minitron" / "text"
COPIED = (
    "minitron.text",
    "minitron.model.runtime_limits",
    *(f"minitron.machine.{name}" for name in ("memory", "cpu_execution", "cpu_head", "cpu_memory", "openvino")),
)


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_models_need_of_the_toolkit_what_a_repository_has_a_copy_of() -> None:
    """A rendered repository is served in NVIDIA's image too, where the toolkit is not."""
    files = sorted(SELF_CONTAINED.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        ours = {name for name in imported(path) if name.partition(".")[0].startswith("minitron")}
        assert all(name.startswith(COPIED) for name in ours), (path, ours)


def test_what_a_repository_has_a_copy_of_needs_nothing_else_of_the_toolkit() -> None:
    for module in COPIED:
        place = ROOT.joinpath("core", *module.split("."))
        for path in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            ours = {name for name in imported(path) if name.startswith("minitron.")}
            assert all(name.startswith(COPIED) for name in ours), (path, ours)


def test_the_text_code_needs_what_that_image_has() -> None:
    for path in TEXT.glob("*.py"):
        foreign = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"minitron"}
        assert foreign <= {"numpy", "tokenizers", "transformers", "grpc", "tritonclient"}, path
        # The messages of the protocol that it speaks, and none of Triton's clients (import-linter sees whole packages).
        of_triton = {name for name in imported(path) if name.startswith("tritonclient")}
        assert of_triton <= {"tritonclient.grpc.service_pb2"}, path


def test_the_client_s_names_are_those_of_its_package() -> None:
    assert minitron_client.__all__ == client.__all__
    assert all(getattr(minitron_client, name) is getattr(client, name) for name in client.__all__)


def test_help_imports_nothing_heavy() -> None:
    heavy = ["numpy", "jinja2", "yaml", "pydantic", "tritonclient", "grpc", "tqdm", "tokenizers", "transformers"]
    heavy += ["huggingface_hub", "openvino", "torch"]
    code = (
        "import sys; from minitron_cli import main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)})  # fmt: skip
    assert done.stderr.strip() == "[]"
    assert "accept" in done.stdout
