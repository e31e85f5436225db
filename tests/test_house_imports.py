"""Imports point one way: build, model_repo and clients to core, never sideways, never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOMS, ROOT

PACKAGE = "minitron_trtllm"
#: Inside Triton these stand alone in a version folder: they import what lies beside them there, and the text code.
SELF_CONTAINED = ROOT / "model_repo" / PACKAGE / "models"
TEXT = ROOT / "core" / PACKAGE / "text"


def modules_of(room: str) -> dict[str, Path]:
    """Dotted name below minitron_trtllm → file, of every module in a room."""
    base = ROOT / room / PACKAGE
    found = {}
    for path in base.rglob("*.py"):
        words = path.relative_to(base).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def imported(path: Path) -> set[str]:
    """Dotted names below minitron_trtllm that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or SELF_CONTAINED in path.parents, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.removeprefix(PACKAGE + ".") for name in names if name.startswith(PACKAGE + ".")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_itself_and_core(room: str) -> None:
    others = {name: other for other in ROOMS if other not in (room, "core") for name in modules_of(other) if name}
    for path in modules_of(room).values():
        wrong = {name: others[name] for name in imported(path) if name in others}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_text_code_and_the_models_need_nothing_else_of_the_toolkit() -> None:
    """A rendered repository holds a copy of them, also in NVIDIA's image, where the toolkit is not."""
    for path in (*TEXT.glob("*.py"), *SELF_CONTAINED.rglob("*.py")):
        assert all(name.split(".")[0] in ("text", "memory", "cpu_execution") for name in imported(path)), path


def test_the_text_code_knows_neither_triton_s_python_api_nor_http() -> None:
    for path in TEXT.glob("*.py"):
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        foreign = names - set(sys.stdlib_module_names) - {PACKAGE}
        assert foreign <= {"numpy", "transformers", "grpc", "tritonclient"} and not names & {"http", "urllib"}, path


def test_no_module_name_is_in_two_rooms() -> None:
    seen: dict[str, str] = {}
    for room in ROOMS:
        for name, path in modules_of(room).items():
            assert name not in seen or path.name == "__init__.py", f"{name} is in {seen[name]} and {room}"
            seen[name] = room


def test_rooms_are_namespace_portions() -> None:
    """A file __init__.py there would hide the other rooms (PEP 420)."""
    for room in ROOMS:
        for folder in (room, f"{room}/{PACKAGE}", f"{room}/{PACKAGE}/commands"):
            assert not (ROOT / folder / "__init__.py").exists()


def test_help_imports_nothing_heavy() -> None:
    heavy = ["numpy", "jinja2", "yaml", "pydantic", "tritonclient", "grpc", "tqdm", "tokenizers", "transformers"]
    heavy += ["huggingface_hub", "openvino", "torch"]
    code = (
        "import sys; from minitron_trtllm import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "core")})  # fmt: skip
    assert done.stderr.strip() == "[]"
    assert "demo" in done.stdout
